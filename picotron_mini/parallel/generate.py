"""Generation from a model that is spread over ranks, for those that do not fit one device.

    first stage:  tokens -> layers --send--> next stage --send--> ... last stage: logits, slices gathered over tp
                    ^                                                            |
                    +---------------------- broadcast over pp <------------------+

Each stage caches the keys and values of its own layers and heads. Every rank gets the same logits and draws with the
same seed, so all know the next token without being told. A pipeline has nothing to overlap here: one token is one
micro-batch, and its stages take turns. Data- and context-parallel replicas write the same text.

Cost a token, in payload: each stage but the last sends B D numbers, and its tensor-parallel pairs sum B D each, as in
training; the last gathers B V / tp and broadcasts B V.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..collectives import broadcast, receive, send
from ..config import ModelConfig, RunConfig
from ..mesh import Mesh
from ..model.generate import KeyValueCache
from ..model.gpt import Block, attend
from .parallelize import Parallel, parallelize
from .tensor import gather_logits


def load_parallel(
    run: RunConfig, config: ModelConfig, state: dict[str, Tensor], mesh: Mesh, device: torch.device
) -> Parallel:
    """This rank's part of a trained model.

    Args:
        run: resolved; its layout and dtype count.
        config, state: of the whole model, as `load_hf` gives them.
    """
    everything = tuple({name.split(".")[0] for name in state})  # nothing is trained: there are no gradient buffers
    # a line of stages, whatever the run was trained with
    train = replace(run.train, freeze=everything, sequence_parallel=False, schedule="1f1b")
    parallel = parallelize(replace(run, model=config, train=train), mesh, device)
    for block in (block for chunk in parallel.chunks for block in chunk.layers.values()):
        assert isinstance(block, Block)
        block.attention.attend = attend  # cp ranks are replicas here: each is given all tokens
    index = parallel.index
    with torch.no_grad():
        for name, parameter in parallel.parameters.items():
            parameter.copy_(parallel.layout[name].part(state[name], index))
    if parallel.routers is not None:
        parallel.routers.load(state)
    return parallel


def next_logits(parallel: Parallel, tokens: Tensor, cache: KeyValueCache) -> Tensor:
    """Scores [B, V] of what follows tokens [B, T], which are appended to the cache. Every rank must call it.

    Args:
        tokens: the same on every rank.
        cache: this rank's own.
    """
    model, mesh, config = parallel.model, parallel.mesh, parallel.run.model
    pp = mesh["pp"]
    x = tokens
    if pp.index > 0:
        x = torch.empty(*tokens.shape, config.hidden_size, dtype=parallel.dtype, device=parallel.device)
        receive(x, pp, pp.index - 1).wait()
    hidden = model(x, cache=cache)
    if pp.index < pp.size - 1:
        send(hidden.contiguous(), pp, pp.index + 1).wait()
        logits = torch.empty(len(tokens), config.vocab_size, dtype=parallel.dtype, device=parallel.device)
    else:
        logits = gather_logits(model.logits(hidden[:, -1]), config.vocab_size, mesh["tp"]).contiguous()
    return broadcast(logits, pp, root=pp.size - 1)
