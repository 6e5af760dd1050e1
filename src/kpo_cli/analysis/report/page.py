"""report.html: one file with everything in it. Texts of responses are untrusted: they travel as data, not as markup."""

import json
from collections.abc import Callable
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from kpo_cli.analysis.config import AnalyzeConfig
from kpo_cli.analysis.report import figures
from kpo_cli.analysis.report.tables import Table, report_tables
from kpo_cli.analysis.report.tokens import Decoder, find_decoder
from kpo_cli.analysis.statistics.analyse import Analysis
from kpo_cli.errors import UserError
from kpo_cli.runs.directory import finite, write_text
from kpo_cli.runs.ratios import Ratios

TOKENS_SHOWN = 20_000
"""In the browser, of all responses together: keeps the report below 5 MB."""
TABLE_NOTE = (
    "value: all off-policy tokens, with its 95% interval over prompts. sample: some responses, at random; shuffled "
    "and signs flipped: what the same responses give with their tokens in random order, and with random signs; the "
    "bands hold all statistics of all series together in 95% of the draws. *: the sample lies outside."
)
CAPTIONS = {
    "traces": "The longest responses of the sample, raw and filtered. The axis is linear up to the median size of a "
    "raw log-ratio and logarithmic beyond.",
    "run_lengths": "Run lengths of the signs. Lines: tokens shuffled within their response, and random signs.",
    "spectrum": "Mean periodogram relative to white noise. Dashed: the same filter on shuffled tokens. Left of the "
    "vertical line lies the low-frequency energy.",
    "autocorrelation": "Autocorrelation of the log-ratios and of their signs. Dashed: the same on shuffled tokens.",
}


def write_analysis(analysis: Analysis, folder: Path, config: AnalyzeConfig, stage: Callable[[str], None]) -> None:
    """analysis.json and, if configured, figures and report.html. Raises UserError if `folder` cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "analysis.json", json.dumps(finite(analysis.found), indent=1) + "\n")
        if config.report:
            stage("figures and report")
            write_report(analysis, folder, config.responses)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); choose another run_dir=") from None


def write_report(analysis: Analysis, folder: Path, responses: int) -> None:
    """Figures into folder/figures, report.html into `folder`."""
    drawn = figures.save(figures.draw_all(analysis), folder / "figures")
    facts = analysis.found["source"]
    decoder = find_decoder(facts["tokenizer"])
    page = render(
        title=f"Ratios of {facts['name']}",
        summary=analysis.found["summary"],
        drawn=drawn,
        captions=CAPTIONS,
        tables=report_tables(analysis.found),
        browser=browser_data(analysis, responses, decoder),
        notes=facts["problems"],
        table_note=TABLE_NOTE,
    )
    write_text(folder / "report.html", page)


def render(
    *,
    title: str,
    summary: str,
    drawn: dict[str, str],
    captions: dict[str, str],
    tables: list[Table],
    browser: dict[str, Any] | None,
    notes: list[str],
    table_note: str,
) -> str:
    """The page. Everything that is not ours is escaped here."""
    template = resources.files("kpo_cli.analysis.report").joinpath("page.html").read_text("utf-8")
    parts = [
        f"<figure>{figures.inline(svg, name)}<figcaption>{escape(captions[name])}</figcaption></figure>"
        for name, svg in drawn.items()
    ]
    return Template(template).substitute(
        title=escape(title),
        summary=escape(summary),
        notes="".join(f'<p class="problem">{escape(note)}</p>' for note in notes),
        figures="\n".join(parts),
        table_note=escape(table_note),
        tables="\n".join(as_html(table) for table in tables),
        browser_hidden="" if browser else "hidden",
        data=script_data(browser),
    )


def as_html(table: Table) -> str:
    def cells(tag: str, row: list[str]) -> str:
        shown = [
            f"<{tag}{'' if i < table.label_columns else ' class=n'}>{escape(cell)}</{tag}>"
            for i, cell in enumerate(row)
        ]
        return f"<tr>{''.join(shown)}</tr>"

    body = "".join(cells("td", row) for row in table.rows)
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    return (
        f"<h3>{escape(table.title)}</h3><div class=scroll><table><thead>{cells('th', table.columns)}</thead>"
        f"<tbody>{body}</tbody></table></div>{note}"
    )


def script_data(value: Any) -> str:
    """JSON that can stand inside a script element, whatever its texts hold."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def browser_data(analysis: Analysis, responses: int, decoder: Decoder | None) -> dict[str, Any] | None:
    """The responses that the page lets one look at: tokens, and their values in every series."""
    sample = analysis.sample
    if not responses or not len(sample):
        return None
    chosen = figures.longest(sample.rows(slice(responses)), responses)
    values = {each.name: each.of(chosen) for each in figures.available(analysis.series, chosen)}
    shown, left = [], TOKENS_SHOWN
    for row in range(len(chosen)):
        entry = _response(chosen, row, values, decoder, left)
        left -= len(entry["tokens"])
        if entry["tokens"]:
            shown.append(entry)
    return {"series": list(values), "responses": shown, "decoded": decoder is not None}


def _response(batch: Ratios, row: int, values: dict[str, Any], decoder: Decoder | None, most: int) -> dict[str, Any]:
    place = np.flatnonzero(batch.mask[row])
    used = place[:most]
    entry: dict[str, Any] = {
        "step": int(batch.step[row]),
        "length": len(place),
        "tokens": [str(i) for i in place[: len(used)]],
        "values": {name: _short(x[row, used]) for name, x in values.items()},
        "prompt": None,
    }
    for name, array in (("reward", batch.rewards), ("advantage", batch.advantages)):
        entry[name] = None if array is None or np.isnan(array[row]) else float(f"{float(array[row]):.3g}")
    if batch.old_log_probs is not None:
        entry["p"] = _short(np.exp(batch.old_log_probs[row, used]))
    if batch.entropy is not None:
        entry["entropy"] = _short(batch.entropy[row, used])
    if batch.response_ids is not None:
        ids = batch.response_ids[row, used].tolist()
        entry["tokens"] = [decoder.token(i) for i in ids] if decoder else [str(i) for i in ids]
    if batch.texts is not None:
        entry["prompt"] = f"response: {batch.texts[row]}"
    if decoder and batch.prompt_ids is not None and batch.prompt_lengths is not None:
        entry["prompt"] = decoder.text(batch.prompt_ids[row, : int(batch.prompt_lengths[row])].tolist())
    return entry


def _short(values: Any) -> list[float]:
    """Three digits: what the eye can use, a third of the bytes."""
    return [float(f"{value:.3g}") for value in np.nan_to_num(values).tolist()]
