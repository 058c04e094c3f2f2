"""Distributed training of Llama-style language models, small enough to read and proven equal to one device.

Import from the module that does the thing; nothing is imported here, so `import picotron_mini` costs nothing.

    from picotron_mini.launch import launch                     # run a function on N ranks
    from picotron_mini.mesh import Mesh                         # which ranks work together
    from picotron_mini.collectives import all_reduce, ledger    # what they say, counted
    from picotron_mini.model.gpt import GPT                     # the model, for one device
    from picotron_mini.parallel.parallelize import parallelize  # the same model on a mesh
    from picotron_mini.verify import verify                     # is it the same?
    from picotron_mini.train import train                       # all of it
"""
