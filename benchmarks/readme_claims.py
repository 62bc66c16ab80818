"""Write a study's claims into the README, between its marks: `python benchmarks/readme_claims.py STUDY README.md`."""

import json
import sys
from pathlib import Path

BEGIN, END = "<!-- study:begin -->", "<!-- study:end -->"


def words(summary: dict) -> str:
    """The claims of a study in Markdown, with what they rest on."""
    data = summary["data"]
    title = f"What `make study` measured ({data['name']}, `{summary['model']}`, {summary['compared']} against "
    title += f"{summary['baseline']}, {len(summary['seeds']['measure'])} seeds, {summary['runs']} trainings in "
    title += f"{summary['seconds']:.0f} s on two cores):"
    rows = [f"| {name.replace('_', ' ')} | {c['verdict']} | {c['text']} |" for name, c in summary["claims"].items()]
    return "\n".join([title, "", "| claim | verdict | in words |", "|---|---|---|", *rows])


def main() -> None:
    study, readme = Path(sys.argv[1]), Path(sys.argv[2])
    text = readme.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    summary = json.loads((study / "summary.json").read_text())
    readme.write_text(f"{before}{BEGIN}\n{words(summary)}\n{END}{after}")


if __name__ == "__main__":
    main()
