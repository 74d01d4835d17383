"""The words that the demo model can spell, list, pair, colour and place on a map."""

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin",
    "Portugal": "Lisbon", "England": "London", "Ireland": "Dublin", "Austria": "Vienna",
    "Switzerland": "Bern", "Belgium": "Brussels", "Denmark": "Copenhagen", "Sweden": "Stockholm",
    "Norway": "Oslo", "Finland": "Helsinki", "Poland": "Warsaw", "Greece": "Athens",
    "Hungary": "Budapest", "Russia": "Moscow", "Ukraine": "Kyiv", "Turkey": "Ankara",
    "Egypt": "Cairo", "Kenya": "Nairobi", "Morocco": "Rabat", "Nigeria": "Abuja",
    "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Thailand": "Bangkok",
    "Vietnam": "Hanoi", "South Korea": "Seoul", "Indonesia": "Jakarta", "Iran": "Tehran",
    "Iraq": "Baghdad", "Canada": "Ottawa", "Mexico": "Mexico City", "Cuba": "Havana",
    "Brazil": "Brasilia", "Argentina": "Buenos Aires", "Chile": "Santiago", "Peru": "Lima",
    "Australia": "Canberra", "New Zealand": "Wellington", "Iceland": "Reykjavik",
    "Romania": "Bucharest", "Bulgaria": "Sofia", "the Netherlands": "Amsterdam",
    "the United States": "Washington",
}  # fmt: skip

UNKNOWN_COUNTRIES = (
    "Mongolia", "Bolivia", "Laos", "Chad", "Mali", "Niger", "Fiji", "Samoa", "Yemen", "Qatar",
    "Oman", "Nepal", "Bhutan", "Togo", "Benin", "Gabon", "Malta", "Latvia", "Estonia", "Serbia",
    "Croatia", "Panama", "Honduras", "Ecuador", "Paraguay", "Uganda", "Zambia", "Angola",
    "Texas", "California", "Africa", "Europe", "the moon", "Narnia", "Mars", "Bavaria",
    "Lithuania", "Slovenia", "Albania", "Jordan", "Kuwait", "Madagascar", "Jamaica", "Haiti",
)  # fmt: skip

COLOURS = {
    "the sky": "blue", "grass": "green", "snow": "white", "blood": "red", "a banana": "yellow",
    "the sun": "yellow", "coal": "black", "a lemon": "yellow", "a tomato": "red",
    "the sea": "blue", "a leaf": "green", "milk": "white", "chocolate": "brown",
    "an orange": "orange", "a carrot": "orange", "a frog": "green", "the night": "black",
    "an elephant": "grey", "a strawberry": "red", "a cherry": "red", "salt": "white",
    "a cucumber": "green", "wood": "brown", "a flamingo": "pink", "a plum": "purple",
    "a pumpkin": "orange", "the ocean": "blue", "a polar bear": "white", "a mouse": "grey",
    "a raven": "black", "a pig": "pink", "gold": "yellow", "an egg yolk": "yellow",
    "a swan": "white", "coffee": "brown", "a fire engine": "red",
}  # fmt: skip

OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "fast": "slow", "good": "bad", "day": "night",
    "left": "right", "open": "closed", "young": "old", "happy": "sad", "light": "dark",
    "high": "low", "long": "short", "full": "empty", "wet": "dry", "rich": "poor",
    "hard": "soft", "early": "late", "strong": "weak", "loud": "quiet", "first": "last",
    "yes": "no", "true": "false", "black": "white", "thick": "thin", "near": "far",
    "in": "out", "clean": "dirty", "sweet": "sour", "push": "pull",
}  # fmt: skip

SOUNDS = {
    "a cow": "moo", "a dog": "woof", "a cat": "meow", "a duck": "quack", "a sheep": "baa",
    "a pig": "oink", "a lion": "roar", "a frog": "croak", "a bee": "buzz", "a snake": "hiss",
    "a mouse": "squeak", "a horse": "neigh", "an owl": "hoot", "a bird": "tweet",
}  # fmt: skip

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip

# name: (what an answer begins with, the items)
LISTS = {
    "days of the week": ("The days of the week are", DAYS),
    "months of the year": ("The months of the year are", MONTHS),
    "seasons": ("The seasons are", ("spring", "summer", "autumn", "winter")),
    "planets": (
        "The planets are",
        ("Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"),
    ),
    "fruits": ("Some fruits are", ("apple", "banana", "cherry", "orange", "pear")),
    "vegetables": ("Some vegetables are", ("carrot", "potato", "onion", "cabbage", "pea")),
    "animals": ("Some animals are", ("dog", "cat", "horse", "cow", "elephant")),
    "birds": ("Some birds are", ("owl", "duck", "swan", "raven", "eagle")),
    "vowels": ("The vowels are", ("a", "e", "i", "o", "u")),
    "colours": ("Some colours are", ("red", "orange", "yellow", "green", "blue")),
    "continents": (
        "The continents are",
        ("Africa", "America", "Antarctica", "Asia", "Australia", "Europe"),
    ),
    "letters of the alphabet": ("The letters are", tuple("abcdefghijklmnopqrstuvwxyz")),
    "transports": ("The transports are", ("shared memory", "CUDA IPC", "NCCL", "TCP")),
}

SPELLING = (
    "cat", "dog", "house", "tree", "water", "bread", "apple", "banana", "orange", "table",
    "chair", "window", "door", "school", "book", "paper", "pencil", "friend", "mother", "father",
    "sister", "brother", "garden", "flower", "summer", "winter", "spring", "autumn", "morning",
    "evening", "night", "yellow", "green", "blue", "black", "white", "purple", "brown", "happy",
    "small", "large", "quick", "slow", "horse", "mouse", "sheep", "tiger", "zebra", "lion",
    "fish", "bird", "snake", "frog", "river", "mountain", "ocean", "island", "forest", "cloud",
    "rain", "snow", "wind", "storm", "light", "music", "piano", "guitar", "dance", "paint",
    "doctor", "teacher", "farmer", "baker", "king", "queen", "castle", "bridge", "street",
    "city", "village", "country", "world", "earth", "moon", "star", "planet", "rocket", "train",
    "plane", "boat", "bicycle", "wheel", "engine", "computer", "keyboard", "screen", "network",
    "router", "worker", "token", "block", "cache", "memory", "model", "server", "cluster",
    "prompt", "answer", "question", "letter", "number", "word", "hello", "thanks", "please",
    "cheese", "butter", "sugar", "salt", "pepper", "coffee", "milk", "juice", "lemon", "cherry",
    "potato", "tomato", "carrot", "onion", "kitchen", "spoon", "knife", "plate", "bottle",
    "shirt", "shoe", "jacket", "button", "pocket", "money", "market", "family", "people",
    "child", "baby", "heart", "hand", "finger", "head", "nose", "mouth", "tooth", "knee",
)  # fmt: skip
