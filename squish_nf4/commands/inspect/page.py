"""inspect's page: one HTML file that needs nothing else, in light and dark, on a phone and on a wide screen."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from squish_nf4._version import __version__
from squish_nf4.checkpoint.audit.inspection import Inspected, Inspection
from squish_nf4.checkpoint.audit.measure import Group, Nf4Numbers, entropy_of
from squish_nf4.commands.inspect.plots import draw_all
from squish_nf4.commands.inspect.print import WHERE_FROM, decibels, shape_of
from squish_nf4.commands.terminal import count, size
from squish_nf4.replace import written_beside

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --raised: #f5f6f8; --ink: #1d232b; --muted: #68727e; --faint: #e3e6ea;
  --accent: #0b6bb8; --warm: #b8500b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14181d; --raised: #1d232a; --ink: #e6e9ed; --muted: #98a2ae; --faint: #323a44;
    --accent: #5db0f0; --warm: #f0a05d;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 22px; line-height: 1.3; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 15px; margin: 0 0 8px; }
.lead { color: var(--muted); margin: 0 0 20px; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-bottom: 28px; }
.tile { background: var(--raised); border-radius: 8px; padding: 12px 14px; }
.tile b { display: block; font-size: 22px; font-weight: 600; line-height: 1.25; }
.tile span { color: var(--muted); font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 28px;
  margin-bottom: 36px; }
figure { margin: 0; min-width: 0; }
figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 5px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--faint); }
th { color: var(--muted); font-weight: 500; position: sticky; top: 0; background: var(--ground); }
th button { all: unset; cursor: pointer; }
th button:hover, th button:focus-visible { color: var(--ink); text-decoration: underline; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; overflow-wrap: anywhere;
  min-width: 15em; }
td small { color: var(--muted); display: block; }
td svg { height: 18px; width: 66px; display: block; margin-left: auto; fill: var(--accent); }
section { margin-bottom: 36px; }
footer { color: var(--muted); font-size: 13px; }
"""

# A click on the head of a column sorts by it; without scripts the page is the same in the order of the file.
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending";
    const key = row => row.cells[column].dataset.key ?? row.cells[column].textContent;
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a), y = key(b), numbers = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
      if (x === "" || y === "") return (x === "") - (y === "");
      return (down ? -1 : 1) * (numbers ? x - y : x.localeCompare(y));
    });
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows);
  }));
}
"""

STORED_HEADS = ("bits a weight", "bytes")
ERROR_HEADS = ("relative RMS", "SNR", "cosine", "largest error", "entropy", "levels")
NF4_HEADS = ("tensor", "shape", "group size", *STORED_HEADS, *ERROR_HEADS)
KEPT_HEADS = ("tensor", "shape", "kept as", *STORED_HEADS)
WORST_HEADS = ("tensor", "row", "columns", "scale", "relative error", "share of the squared error")


def write_page(report: Inspection, path: Path) -> Path:
    """Write the page as one file, which replaces an earlier one whole; returns its path.

    Raises:
        FileExistsError, IsADirectoryError: what is there is no regular file.
        ModuleNotFoundError: matplotlib is not installed.
    """
    page = render(report)
    with written_beside(path) as file:
        file.write_text(page, encoding="utf-8", errors="backslashreplace")  # a path may hold what is no Unicode
    return path


def render(report: Inspection) -> str:
    title = escape(f"{report.path.name or report.path} in NF4")
    plots = "".join(f"<figure><h2>{escape(name)}</h2>{svg}</figure>" for name, svg in draw_all(report).items())
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><main>\n"
        f'<h1>{title}</h1><p class="lead">{lead(report)}</p>\n'
        f'<div class="tiles">{tiles(report)}</div>\n<div class="plots">{plots}</div>\n'
        f"{tables(report)}"
        f"<footer>squish-nf4 {__version__} inspect. {footnote(report)}</footer>\n"
        f"</main><script>{SCRIPT}</script></body></html>\n"
    )


def lead(report: Inspection) -> str:
    kept = len(report.owned) - len(report.in_nf4)
    text = (
        f"{escape(str(report.path))}: {len(report.in_nf4)} of {count(len(report.owned), 'tensor')} in NF4, {kept} kept"
    )
    return f"{text}; compared with {escape(str(report.source))}" if report.source else text


def tiles(report: Inspection) -> str:
    found = {
        "weights": f"{report.weights:,}",
        "in all files": size(report.nbytes),
        "bits a weight, all": f"{report.bits_per_weight:.2f}",
    }
    if report.in_nf4:
        found |= {
            "bits a weight, NF4": f"{report.nf4_bits_per_weight:.2f}",
            "relative RMS error": f"{report.relative_rms:.4f}",
            "of 4 index bits used": f"{entropy_of(report.indices):.2f}",
        }
    return "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for name, value in found.items())


def footnote(report: Inspection) -> str:
    if not report.in_nf4:
        return "Nothing is in NF4."
    errors = "; ".join(WHERE_FROM[basis] for basis in report.bases)
    return f"Errors are {errors}. Relative RMS: the norm of the error over the norm of the weights."


def tables(report: Inspection) -> str:
    in_nf4 = [nf4_row(tensor, tensor.nf4) for tensor in report.tensors if tensor.nf4]
    kept = [kept_row(tensor) for tensor in report.tensors if not tensor.nf4]
    return (
        table("Tensors in NF4", NF4_HEADS, in_nf4)
        + table(
            f"The groups that make the most of the error, {report.groups}, in the worst tensors",
            WORST_HEADS,
            worst_rows(report),
        )
        + table("Kept tensors", KEPT_HEADS, kept)
    )


def table(title: str, heads: Sequence[str], rows: Sequence[str]) -> str:
    """A section with a table that can be sorted; nothing without rows."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col"><button>{name}</button></th>' for name in heads)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<section><h2>{title}</h2><div class="scroll"><table class="sortable">'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div></section>\n"
    )


def first_cells(tensor: Inspected, form: str) -> list[str]:
    note = f"tied to {tensor.tied_to}" if tensor.tied_to else tensor.reason
    name = breakable(tensor.name) + (f"<small>{escape(note)}</small>" if note else "")
    return [
        cell(name, tensor.name),
        cell(shape_of(tensor.shape), tensor.size),
        cell(escape(form)),
        cell(f"{tensor.bits_per_weight:.2f}", tensor.bits_per_weight),
        cell("" if tensor.tied_to else size(tensor.nbytes), "" if tensor.tied_to else tensor.nbytes),
    ]


def kept_row(tensor: Inspected) -> str:
    return "".join(first_cells(tensor, tensor.stored_as))


def nf4_row(tensor: Inspected, numbers: Nf4Numbers) -> str:
    about = "~" if numbers.basis == "estimated" else ""
    cosine = "" if numbers.cosine is None else f"{numbers.cosine:.5f}"
    largest = "" if numbers.largest_error is None else f"{numbers.largest_error:.3g}"
    cells = [
        *first_cells(tensor, str(numbers.group_size)),
        cell(f"{about}{numbers.relative_rms:.4f}", numbers.relative_rms),
        cell(decibels(numbers), min(numbers.snr, 1e9)),
        cell(cosine),
        cell(largest, largest),
        cell(f"{numbers.entropy:.3f}"),
        cell(bars(numbers), numbers.entropy),
    ]
    return "".join(cells)


def breakable(name: str) -> str:
    """A tensor's name in HTML, in which a line may end behind a dot."""
    return escape(name).replace(".", ".<wbr>")


def cell(text: str, key: object = None) -> str:
    """A cell of a table; ``key`` is what to sort by, where the text does not do."""
    return f"<td>{text}</td>" if key is None else f'<td data-key="{escape(str(key))}">{text}</td>'


def bars(numbers: Nf4Numbers) -> str:
    """A histogram of the 16 levels, as high as a line of text."""
    most = max(numbers.indices) or 1
    heights = [round(18 * n / most, 1) for n in numbers.indices]
    drawn = "".join(f'<rect x="{4 * i}" y="{18 - h:.1f}" width="3" height="{h}"/>' for i, h in enumerate(heights))
    label = ", ".join(map(str, numbers.indices))
    return f'<svg viewBox="0 0 63 18" role="img" aria-label="counts of the 16 levels: {label}">{drawn}</svg>'


def worst_rows(report: Inspection) -> list[str]:
    ranked = sorted(report.in_nf4, key=lambda pair: -pair[1].relative_rms)[:5]
    return [group_row(tensor, group) for tensor, numbers in ranked for group in numbers.worst]


def group_row(tensor: Inspected, group: Group) -> str:
    columns = f"{group.columns[0]}-{group.columns[1]}"
    cells = [
        cell(breakable(tensor.name), tensor.name),
        cell(str(group.row)),
        cell(columns, group.columns[0]),
        cell(f"{group.scale:.4g}", group.scale),
        cell(f"{group.relative_rms:.4f}", group.relative_rms),
        cell(f"{group.share:.2%}", group.share),
    ]
    return "".join(cells)
