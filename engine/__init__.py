"""The engine: requests, blocks, scheduler, model, sampler and the thread that runs them.

Both kinds of worker run this same engine; a worker's role is a matter of what it lets in and out.
`request`, `blocks` and `scheduler` hold no tensors.
"""
