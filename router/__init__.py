"""The public HTTP APIs: render, tokenize, place, stream, survive.

A request's way through the files:

    app ─► schemas ─► requests ─► chat, tokenizer, sampling     what it asks for, as frozen values
                 └─► dispatch ─► placement, workers             which workers, over which legs
                          └─► output ─► detokenize, stops       tokens to text
                                   └─► *_writer                 text to a protocol's JSON

Each protocol is a parser into `GenerateRequest` and a `Writer` out of it: openai_writer for
completions and chat, messages (by way of chat) and messages_writer for Anthropic's,
tokens_writer for tokens in and out.

Workers never see text, this process never loads torch.
"""
