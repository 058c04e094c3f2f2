"""A picture of the bytes that each mesh axis carries in one training step, predicted and counted.

The prediction is a formula evaluated before any process starts; the count comes from the ledger in
`collectives`. They are drawn to one scale, the prediction as an outline above the filled count, so that two bars
of unequal length are a mistake in one of the two. Input is `traffic.json`.
"""

from __future__ import annotations

from typing import Any

from picotron_mini.monitoring.page import escape
from picotron_mini.monitoring.units import bytes_text


def traffic_section(traffic: dict[str, Any], steps: int) -> str:
    """The HTML of the section: a sentence with the verdict, then a row of bars for each axis and collective."""
    rows = traffic["per_step"]
    if not rows:
        return "<p>Nothing was sent: one rank talks to nobody.</p>"
    most = max(max(row["predicted"] or 0, row["counted"] or 0) for row in rows) or 1
    counted = sum(row["counted"] or 0 for row in rows)
    wrong = [f"{row['axis']} {row['op']}" for row in rows if row["predicted"] != row["counted"]]
    verdict = (
        f"Prediction and count differ for {', '.join(wrong)}." if wrong else "Prediction and count agree to the byte."
    )
    over = f", {bytes_text(counted * steps)} in the {steps} steps of this run" if steps else ""
    body = []
    for row in rows:
        bars = "".join(
            f'<rect class="{kind}" x="1" y="{y}" width="{98 * (row[kind] or 0) / most:.2f}%" height="7"/>'
            for kind, y in (("predicted", 2), ("counted", 12))
        )
        label = f"{row['axis']} {row['op']}: {row['predicted']} bytes predicted, {row['counted']} counted"
        cells = "".join(
            f'<td class="number" title="{bytes_text(row[kind])}">{"?" if row[kind] is None else f"{row[kind]:,}"}</td>'
            for kind in ("predicted", "counted")
        )
        body.append(
            f'<tr><th scope="row">{escape(row["axis"])} <code>{escape(row["op"])}</code></th>{cells}'
            f'<td class="bar"><svg role="img" aria-label="{escape(label)}">{bars}</svg></td></tr>'
        )
    head = "".join(
        f'<th scope="col"{extra}>{text}</th>'
        for text, extra in (
            ("axis and collective", ""),
            ("predicted, bytes", ' class="number"'),
            ("counted, bytes", ' class="number"'),
            ("outline predicted, filled counted", ""),
        )
    )
    return (
        f"<p>What rank 0 hands to <code>torch.distributed</code> in one training step: {bytes_text(counted)}{over}. "
        f'{escape(verdict)}</p><div class="wide"><table class="traffic"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
