"Pages of experiments, run as papermill runs them, but in this process: a kernel would take longer than the page."
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_page(
    name: str,  # such as "table1"
    **parameters,  # in place of those in the page
) -> dict:  # the page's variables at its end
    "Execute the code of a page in the current folder."
    names = {}
    for cell in json.loads((ROOT / f"nbs/{name}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), name, "exec"), names)
            if "parameters" in cell["metadata"].get("tags", []):
                names.update(parameters)
    return names
