"""The tokenizer of the demo model: byte-level BPE with single digits, and a ChatML template."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pdserve.demo.corpus import Conversation

END_OF_TEXT = "<|endoftext|>"
START = "<|im_start|>"
END = "<|im_end|>"

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('Unknown role "' ~ message.role ~ '": a message is from system, \
user, assistant or tool.') }}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- elif message.content %}
        {%- for part in message.content %}
            {%- if part.type != 'text' %}
                {{- raise_exception('This model reads text only, not ' ~ part.type ~ '.') }}
            {%- endif %}
            {{- part.text }}
        {%- endfor %}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>\\n' ~ (call.function or call) | tojson ~ '\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def train_tokenizer(texts: Iterable[str], vocab_size: int, longest: int) -> PreTrainedTokenizerFast:
    """A tokenizer with ``vocab_size`` tokens, for a model of at most ``longest`` tokens.

    All 256 bytes are tokens, so that any text comes back as it was.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[START],
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode(
    tokenizer: PreTrainedTokenizerFast, conversation: Conversation
) -> tuple[list[int], list[bool]]:
    """A conversation as the chat template writes it: its token ids, and which the model answers.

    The answered tokens are those of the assistant, with the end mark after them.
    """
    ids: list[int] = []
    answered: list[bool] = []

    def add(text: str, is_answer: bool) -> None:
        part = tokenizer.encode(text, add_special_tokens=False)
        ids.extend(part)
        answered.extend([is_answer] * len(part))

    for message in conversation:
        head = f"{START}{message['role']}\n"
        if message["role"] == "assistant":
            add(head, False)
            add(message["content"] + END, True)
            add("\n", False)
        else:
            add(f"{head}{message['content']}{END}\n", False)
    return ids, answered
