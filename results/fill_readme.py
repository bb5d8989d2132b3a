"""Copy the tables that README shows out of the results, so that every number stands in one place.

    python results/fill_readme.py

README's text between <!-- results/NAME.md --> and <!-- end --> becomes what stands between
<!-- README --> and <!-- end --> in that file. tests/test_readme.py fails where the two differ."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

def filled(text):
    """README with every table as the results have it."""
    def table(place):
        found = re.search(r"<!-- README -->\n(.*?)<!-- end -->", (ROOT / place[2]).read_text(
            "utf-8"), re.DOTALL)
        return f"{place[1]}{found[1]}<!-- end -->"
    return re.sub(r"(<!-- (results/\w+\.md) -->\n).*?<!-- end -->", table, text, flags=re.DOTALL)

if __name__ == "__main__":
    README.write_text(filled(README.read_text("utf-8")), "utf-8")
