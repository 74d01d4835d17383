"""What the demo model knows about the parts of pdserve and the words for them."""

from pdserve.demo.concept import Concept

PARTS = (
    Concept(
        "pdserve",
        ("pdserve", "pdserve", "pd-serve", "this project", "the pdserve cluster", "this cluster"),
        "pdserve is a serving cluster for language models. A router takes requests, prefill "
        "workers read the prompts, and decode workers write the answers.",
        ("pdserve", "prefill", "decode"),
        "pdserve serves language models with separate prefill and decode workers.",
        "Because reading a prompt and writing an answer need different machines to run well.",
        ("What is this?", "What am I talking to?", "What is this software?", "Why pdserve?"),
        ("What kind of software is pdserve?", "What is pdserve all about?"),
    ),
    Concept(
        "router",
        ("the router", "a router", "router", "the pdserve router"),
        "The router is the front door of the cluster. It takes each request, picks a prefill "
        "worker and a decode worker for it, and streams the answer back.",
        ("router", "request", "worker"),
        "The router picks the workers for each request.",
        "Because one place must see the load of all workers to share out the requests well.",
        (
            "Who decides which worker gets a request?",
            "Which part chooses the worker?",
            "Where do requests arrive?",
            "Who picks the workers?",
        ),
        ("Which part picks the worker for a request?", "Who chooses a worker for my request?"),
    ),
    Concept(
        "prefill worker",
        ("a prefill worker", "the prefill worker", "prefill workers", "prefill worker"),
        "A prefill worker reads the whole prompt at once, fills the KV cache for it, makes the "
        "first token, and hands the cache to a decode worker.",
        ("prompt", "kv cache"),
        "A prefill worker reads the prompt and fills the KV cache.",
        "Because reading a prompt is heavy compute, and it should not slow down the answers.",
        ("Which worker reads the prompt?", "Who reads the prompt?", "Who processes my prompt?"),
        ("Which of the workers reads my prompt?", "What is the job of a prefill worker?"),
    ),
    Concept(
        "decode worker",
        ("a decode worker", "the decode worker", "decode workers", "decode worker"),
        "A decode worker takes the KV cache from a prefill worker and writes the answer one "
        "token at a time, for many requests together.",
        ("token", "kv cache"),
        "A decode worker writes the answer, one token at a time.",
        "Because writing tokens is limited by memory speed, so it pays to batch many requests.",
        ("Which worker writes the answer?", "Who writes the tokens?", "Who makes the answer?"),
        ("Which of the workers writes my answer?", "What is the job of a decode worker?"),
    ),
    Concept(
        "prefill",
        ("prefill", "the prefill phase", "the prefill step", "prefilling"),
        "Prefill is the first phase of a request: the model reads all tokens of the prompt in "
        "one go and stores their keys and values. It is limited by compute.",
        ("prefill", "prompt", "compute"),
        "Prefill is reading the prompt.",
        "Because all tokens of the prompt are known, so they can be worked on at once.",
        ("What happens in the prefill phase?", "What happens first with my prompt?"),
        ("What takes place during prefill?",),
    ),
    Concept(
        "decode",
        ("decode", "decoding", "the decode phase", "the decode step"),
        "Decode is the second phase of a request: the model writes one token after the other "
        "and reads the whole KV cache each time. It is limited by memory speed.",
        ("decode", "token", "memory"),
        "Decode is writing the answer token by token.",
        "Because each new token needs the ones before it, so they come one by one.",
        ("What happens in the decode phase?", "What happens after prefill?"),
        ("What takes place during decode?",),
    ),
    Concept(
        "prefill and decode",
        ("prefill and decode", "prefill versus decode", "prefill vs decode"),
        "Prefill reads the whole prompt at once and is limited by compute. Decode writes the "
        "answer token by token and is limited by memory speed.",
        ("prompt", "compute", "memory"),
        "Prefill reads, decode writes.",
        "Because a prompt is known at once, but an answer is not.",
        (
            "What is the difference between prefill and decode?",
            "How do prefill and decode differ?",
            "What does pd mean?",
            "What does PD stand for?",
            "Compare prefill and decode.",
        ),
        ("How is prefill different from decode?",),
    ),
    Concept(
        "kv cache",
        ("the KV cache", "KV cache", "a KV cache", "the key-value cache", "KV caching"),
        "The KV cache holds the keys and values of all tokens seen so far, so that the model "
        "does not compute them again for each new token.",
        ("keys", "values", "token"),
        "The KV cache stores keys and values of past tokens.",
        "Because computing all past tokens again for each new token would be far too slow.",
        ("Where are the keys and values stored?", "What does KV stand for?"),
        ("What is kept in the KV cache?",),
    ),
    Concept(
        "block",
        ("a block", "a KV block", "block", "blocks", "a cache block"),
        "A block is a small piece of the KV cache with room for a fixed number of tokens. "
        "Requests get blocks one by one as they grow.",
        ("block", "kv cache", "tokens"),
        "A block is a fixed-size piece of the KV cache.",
        "Because pieces of one size leave no holes in the memory.",
        ("What are blocks?", "Why is the cache cut into blocks?", "How big is a block?"),
        ("What is a block of the KV cache?",),
    ),
    Concept(
        "block table",
        ("a block table", "the block table", "block table", "block tables"),
        "A block table lists, for one request, which blocks of the KV cache hold its tokens, "
        "in order.",
        ("block", "request"),
        "A block table lists the blocks of a request.",
        "Because the blocks of a request may lie anywhere in the memory.",
        ("How does a request find its blocks?", "Where is it written which blocks I have?"),
        ("How does a request know its blocks?",),
    ),
    Concept(
        "kv transfer",
        ("KV transfer", "the KV transfer", "KV cache transfer", "the cache transfer"),
        "KV transfer moves the KV cache of a request from the prefill worker to the decode "
        "worker, over shared memory, CUDA IPC, NCCL or TCP.",
        ("prefill", "decode", "tcp"),
        "KV transfer moves the cache from prefill to decode.",
        "Because the decode worker needs the cache that the prefill worker has made.",
        (
            "How does the KV cache get to the decode worker?",
            "How is the cache moved?",
            "How do the workers share the KV cache?",
            "Which transports are there?",
        ),
        ("How does the cache move from prefill to decode?",),
    ),
    Concept(
        "nccl",
        ("NCCL", "the NCCL transport", "NCCL transfer"),
        "NCCL is a library of NVIDIA for fast communication between GPUs. pdserve can use it to "
        "move the KV cache between workers on different GPUs.",
        ("nccl", "gpus"),
        "NCCL moves data fast between GPUs.",
        "Because it goes from GPU to GPU without a copy through the host.",
        ("When is NCCL used?", "What does NCCL stand for?"),
        ("Is NCCL a library?",),
    ),
    Concept(
        "cuda ipc",
        ("CUDA IPC", "the CUDA IPC transport", "CUDA inter-process communication"),
        "CUDA IPC lets two processes on one machine share GPU memory, so that the KV cache can "
        "be copied from GPU to GPU without going through the host.",
        ("gpu", "memory", "process"),
        "CUDA IPC shares GPU memory between processes.",
        "Because a copy inside one machine needs no network.",
        ("When is CUDA IPC used?", "How do two processes share GPU memory?"),
        ("How can processes share the memory of a GPU?",),
    ),
    Concept(
        "shared memory",
        ("shared memory", "the shared memory transport", "shm"),
        "Shared memory is host memory that several processes on one machine can read and write. "
        "It is the simple way to move the KV cache between workers on one host.",
        ("memory", "processes"),
        "Shared memory is memory that several processes use.",
        "Because nothing has to be sent: both processes see the same bytes.",
        ("When is shared memory used?", "How do workers on one host share data?"),
        ("When would I use shared memory?",),
    ),
    Concept(
        "tcp",
        ("TCP", "the TCP transport", "TCP transfer"),
        "TCP is the ordinary network connection. It moves the KV cache between any two machines "
        "and always works, but it is the slowest way.",
        ("network", "slow"),
        "TCP works everywhere, but it is slow.",
        "Because the data goes through the host memory and the network.",
        ("When is TCP used?", "Which transport works everywhere?", "Is TCP slow?"),
        ("When would I use TCP?",),
    ),
    Concept(
        "redis",
        ("Redis", "the Redis server", "the registry"),
        "Redis is the small database where the workers of pdserve register and report their "
        "load, so that the router can find them.",
        ("redis", "workers", "router"),
        "Redis is where workers register.",
        "Because the router must know which workers are alive.",
        (
            "How does the router find the workers?",
            "Where do the workers register?",
            "Why does pdserve use Redis?",
        ),
        ("Why is Redis needed?", "How are workers found by the router?"),
    ),
    Concept(
        "ttft",
        ("TTFT", "time to first token", "the time to first token", "the TTFT"),
        "TTFT is the time to first token: how long a user waits from sending a request until "
        "the first token of the answer. Prefill decides it.",
        ("time to first token",),
        "TTFT is the wait for the first token.",
        "Because a user notices the wait before an answer starts.",
        ("What does TTFT stand for?", "How long is the wait for the first token?"),
        ("What is TTFT short for?",),
    ),
    Concept(
        "itl",
        ("ITL", "inter-token latency", "the inter-token latency", "the ITL"),
        "ITL is the inter-token latency: the time between one token of an answer and the next. "
        "Decode decides it.",
        ("inter-token latency", "time between"),
        "ITL is the time between two tokens.",
        "Because a stream that stops and starts is hard to read.",
        ("What does ITL stand for?", "What is the time between two tokens called?"),
        ("What is ITL short for?",),
    ),
    Concept(
        "tpot",
        ("TPOT", "time per output token", "the time per output token", "the TPOT"),
        "TPOT is the time per output token: the mean time that each token after the first one "
        "takes.",
        ("time per output token",),
        "TPOT is the mean time per token.",
        "Because it says how fast an answer is written as a whole.",
        ("What does TPOT stand for?", "What is the mean time per token called?"),
        ("What is TPOT short for?",),
    ),
)
