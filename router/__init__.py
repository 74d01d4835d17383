"""The public HTTP APIs: render, tokenize, place, stream, survive.

A request's way through the files:

    app ─► schemas ─► requests ─► chat, tokenizer, sampling     what it asks for, as frozen values
                 └─► dispatch ─► placement, workers             which workers, over which legs
                          └─► output ─► detokenize, stops       tokens to text
                                   └─► openai, streaming        text to JSON

Workers never see text, this process never loads torch.
"""
