"""`latentforge studio`: one local page over a root of artifacts: data, tokenizer, sampling, runs.

`serve` starts it, `guard` says who may come in, `page` puts the tabs together, each of which has a module. What is
slow is done off the event loop (`work`). The library that draws it is an extra, and no other module imports it.
"""
