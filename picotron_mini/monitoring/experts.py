"""What the experts of a run did: how busy each was over time, and what each has specialised in.

`experts_section` draws both for the report. The load is a strip a layer, with a row an expert and time to the right:

    expert 0   ..::##########       dark: many rows. In balance all cells are as grey as 1/E
    expert 1   ##::..........       an expert that stays pale is dying
    expert 2   ..::::::::::::

`specialisation` runs a trained model over held-out text and counts which kind of character goes to which expert. The
one number of a layer is the information I(kind; expert) in bits that the chosen expert gives about the kind: 0 if
experts take what comes, at most the entropy of the kinds. Such counts from n tokens show a little information where
there is none, about (kinds - 1) (experts - 1) / (2 n ln 2) bits (Miller's correction), which is stated beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from picotron_mini.model.gpt import GPT
from picotron_mini.model.moe import Pool
from picotron_mini.model.routing import Routing
from picotron_mini.monitoring.page import escape
from picotron_mini.monitoring.plots import Series, line_plot

KINDS = ("letters", "digits", "spaces", "line breaks", "punctuation", "other")
BINS = 80  # of a strip, across
ROW = 14  # pixels of an expert
Json = dict[str, Any]


def kind_of(text: str) -> int:
    """The index in `KINDS` of what a token stands for: that of its first character that is no space, if it has one."""
    if "\n" in text:
        return 3
    character = text.strip()[:1] or text[:1]
    if character.isspace():
        return 2
    for index, test in ((0, str.isalpha), (1, str.isdigit)):
        if test(character):
            return index
    return 4 if character.isascii() and character.isprintable() and character else 5


@torch.no_grad()
def specialisation(model: GPT, rows: Tensor, decode: Callable[[int], str], batch: int = 4) -> Json:
    """Which kinds of characters the experts of each layer get.

    Args:
        model: a whole model.
        rows: [R, T] int64, text that it was not trained on.
        decode: the text of one token.

    Returns:
        Plain data: the kinds, for each layer the counts [E, kinds], the information in bits, and the number that chance
        alone would show.
    """
    assert model.config.moe is not None
    ids, place = rows.unique(return_inverse=True)
    kinds = torch.tensor([kind_of(decode(int(token))) for token in ids], device=rows.device)[place]  # [R, T]
    shape = (model.config.moe.num_experts, len(KINDS))
    counts = {layer: torch.zeros(shape, dtype=torch.int64) for layer in model.config.moe_layers}
    for start in range(0, len(rows), batch):
        part = kinds[start : start + batch].flatten()  # [N]

        def observe(layer: int, routing: Routing, y: Tensor, part: Tensor = part) -> Tensor:
            chosen = routing.chosen.long()  # [N, E]
            each = [chosen[part == kind].sum(0) for kind in range(len(KINDS))]
            counts[layer] += torch.stack(each, 1).cpu()
            return y

        model(rows[start : start + batch], pool=Pool(observe=observe))
    layers = [
        {"layer": layer, "counts": table.tolist(), "bits": information(table), "chance": _chance(table)}
        for layer, table in counts.items()
    ]
    return {"kinds": list(KINDS), "tokens": rows.numel(), "layers": layers}


def information(table: Tensor) -> float:
    """I(row; column) in bits of a table of counts."""
    p = table.double() / table.sum().clamp(min=1)
    independent = p.sum(0, keepdim=True) * p.sum(1, keepdim=True)
    return float(torch.special.xlogy(p, torch.where(p > 0, p / independent, 1.0)).sum() / math.log(2))


def _chance(table: Tensor) -> float:
    rows, columns = int((table.sum(1) > 0).sum()), int((table.sum(0) > 0).sum())
    return (rows - 1) * (columns - 1) / (2 * max(int(table.sum()), 1) * math.log(2))


def experts_section(lines: Sequence[Json], special: Json | None) -> str:
    """The HTML of the section; empty for a dense model.

    Args:
        lines: of metrics, of training steps.
        special: of `specialisation`, if the run has ended.
    """
    lines = [line for line in lines if line.get("moe_load")]
    if not lines:
        return ""
    steps, experts = [float(line["step"]) for line in lines], len(lines[0]["moe_load"][0])
    figures = []
    for title, key in (
        ("Entropy of the load, 1 is even", "moe_entropy"),
        ("Busiest expert, over its even share", "moe_max_load"),
        ("Rows dropped, of all", "moe_drop_rate"),
        ("Experts without a row, of all layers", "moe_dead_experts"),
        ("Auxiliary loss, 1 is even", "moe_aux"),
    ):
        values = [float(line[key]) for line in lines]
        if any(values):
            plot = line_plot(f"{title}, against the step", [Series(title, steps, values)], from_zero=True)
            figures.append(f"<figure><h3>{title}</h3>{plot}</figure>")
    odd = sum(int(line["moe_not_finite"]) for line in lines)
    warning = f'<div class="notice bad"><p>Routers met {odd:,} tokens with logits that are not finite.</p></div>'
    return (
        "<h2>Experts</h2><p>How many rows each expert got: a strip a layer, a row an expert, time to the right. "
        f"The even share is 1/{experts}; a cell is full at twice that.</p>"
        f"{warning if odd else ''}{''.join(_strip(lines, layer) for layer in range(len(lines[0]['moe_load'])))}"
        f'<div class="three">{"".join(figures)}</div>{_special(special) if special else ""}'
    )


def _strip(lines: Sequence[Json], layer: int) -> str:
    """The load of one layer over time, as cells."""
    experts, bins = len(lines[0]["moe_load"][layer]), min(BINS, len(lines))
    cells = []
    for column in range(bins):
        part = lines[column * len(lines) // bins : (column + 1) * len(lines) // bins]
        for expert in range(experts):
            load = sum(line["moe_load"][layer][expert] for line in part) / len(part)
            cells.append(
                f'<rect class="counted" x="{column}" y="{expert}" width="1.02" height=".92" '
                f'fill-opacity="{min(1.0, load * experts / 2):.3f}"/>'
            )
    said = f"Load of the {experts} experts of mixture {layer}, from the first to the last step"
    return (
        f"<figure><h3>Mixture {layer}</h3>"
        f'<svg role="img" width="100%" height="{ROW * experts}" viewBox="0 0 {bins} {experts}" '
        f'preserveAspectRatio="none" aria-label="{said}"><title>{said}</title>{"".join(cells)}</svg></figure>'
    )


def _special(special: Json) -> str:
    """Tables of what each expert gets, a share of its rows."""
    out = [
        "<h3>What each expert gets</h3><p>Shares of an expert's rows on held-out text, by the kind of character. "
        "The information says how well the chosen expert tells the kind.</p>"
    ]
    for each in special["layers"]:
        rows = []
        for expert, counts in enumerate(each["counts"]):
            total = sum(counts)
            shares = "".join(f"<td>{100 * n / total:.0f} %</td>" if total else "<td>-</td>" for n in counts)
            rows.append(f"<tr><th>expert {expert}</th><td>{total:,}</td>{shares}</tr>")
        heads = "".join(f"<th>{escape(kind)}</th>" for kind in special["kinds"])
        out.append(
            f'<div class="wide"><table><caption>Layer {each["layer"]}: {each["bits"]:.3f} bits '
            f"(chance alone: {each['chance']:.3f})</caption><thead><tr><th></th><th>rows</th>{heads}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )
    return "".join(out)
