"""Copy what README shows of the results out of them, so that every number stands in one place.

    python results/fill_readme.py

README's text between <!-- results/NAME.md --> and <!-- end --> becomes what stands between
<!-- README --> and <!-- end --> in that file; of several parts, both sides name one: <!--
results/NAME.md part --> and <!-- README part -->. tests/test_readme.py fails where they differ."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

def filled(text):
    """README with every table and figure as the results have it."""
    def section(place):
        marker, source, part = place.groups()
        found = re.search(f"<!-- README{part} -->(.*?)<!-- end -->",
                          (ROOT / source).read_text("utf-8"), re.DOTALL)
        return f"{marker}{found[1]}<!-- end -->"
    return re.sub(r"(<!-- (results/\w+\.md)((?: \w+)?) -->).*?<!-- end -->", section, text,
                  flags=re.DOTALL)

if __name__ == "__main__":
    README.write_text(filled(README.read_text("utf-8")), "utf-8")
