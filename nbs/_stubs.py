"""Write what type checkers read, `advdpnp/*.pyi`, from the exported modules. A checker does not know fastcore's `@patch`:
in a stub, methods that are added so stand in their class. Bodies are left out, and names that begin with an underscore."""
import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "advdpnp"
FIRST = "# Written by nbs/_stubs.py, see CONTRIBUTING.md.\n"
KEPT = {"dataclass", "property", "cached_property", "classmethod", "staticmethod", "contextmanager"}
TYPES = {ast.Dict: "dict", ast.Tuple: "tuple", ast.List: "list"}  # of values; those of calls and the like are Any


def statement(text):
    return ast.parse(text).body[0]


def public(name):
    return not name.startswith("_") or name.startswith("__")


def decorators(node):
    "The decorators of a function or a class: name to node."
    return {ast.unparse(d).split("(")[0]: d for d in getattr(node, "decorator_list", ())}


def given_names(node):
    "The names that an assignment gives values to, and the type of its value."
    names = [part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)]
    constant = type(node.value.value).__name__ if isinstance(node.value, ast.Constant) else "Any"
    return filter(public, names), TYPES.get(type(node.value), constant)


def function_stub(node):
    found = decorators(node)
    node.decorator_list = [d for name, d in found.items() if name in KEPT]
    if "patch" in found and "as_prop=True" in ast.unparse(found["patch"]):
        node.decorator_list.append(ast.Name("property"))
    if "patch" in found and "cls_method=True" in ast.unparse(found["patch"]):
        node.decorator_list.append(ast.Name("classmethod"))
        node.args.args[0].annotation = None
    node.body = [statement("...")]
    return node


def class_stub(node):
    "A class, with what its methods give to `self`, which may be anything."
    own = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
           and ast.unparse(part.value) == "self" and public(part.attr)}
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    for part in fields:
        if ast.unparse(part.annotation) == "object":
            part.annotation = ast.Name("Any")  # it takes anything, and what is read back can be used
    constants = {name: kind for part in node.body if isinstance(part, ast.Assign)
                 for names, kind in [given_names(part)] for name in names}
    methods = [function_stub(part) for part in node.body if isinstance(part, ast.FunctionDef) and public(part.name)]
    own -= {part.target.id for part in fields} | {*constants} | {part.name for part in methods}
    no_argument = " = dataclasses.field(init=False)" if "dataclass" in decorators(node) else ""
    node.body = [*fields, *(statement(f"{name}: ClassVar[{kind}]") for name, kind in constants.items()),
                 *(statement(f"{name}: Any{no_argument}") for name in sorted(own)), *methods] or [statement("...")]
    return node


def module_stub(source):
    tree = ast.parse(source)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    imports, body = ast.parse("import dataclasses\nfrom typing import Any, ClassVar").body, []
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.append(node)
        elif "patch" in decorators(node):
            classes[ast.unparse(node.args.args[0].annotation)].body.append(node)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and public(node.name):
            body.append(node)
        elif isinstance(node, ast.Assign):
            names, kind = given_names(node)
            body += [node if name == "__all__" else statement(f"{name}: {kind}") for name in names]
    body = [class_stub(node) if isinstance(node, ast.ClassDef) else
            function_stub(node) if isinstance(node, ast.FunctionDef) else node for node in body]
    used = {node.id for part in body for node in ast.walk(part) if isinstance(node, ast.Name)}
    for node in imports:
        node.names = [alias for alias in node.names if (alias.asname or alias.name).split(".")[0] in used]
    lines = dict.fromkeys(ast.unparse(node) for node in [*filter(lambda node: node.names, imports), *body])
    return FIRST + re.sub(r":\n +\.\.\.\n*", ": ...\n", "\n".join(lines) + "\n")


def package_stub(source):
    "Of `__init__.py`, whose names come from a module when they are asked for."
    names = next(ast.literal_eval(node.value) for node in ast.parse(source).body
                 if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_NAMES")
    lines = [f"from .{module} import {name} as {name}" for module in names for name in names[module].split()]
    return FIRST + "\n".join([*lines, "__version__: str"]) + "\n"


def stubs():
    "Every stub: file name to text. What the command is made of has none: it is called in a shell."
    modules = [path for path in sorted(PACKAGE.glob("[!_]*.py")) if path.stem != "cli"]
    return {"__init__.pyi": package_stub((PACKAGE / "__init__.py").read_text()),
            **{f"{path.stem}.pyi": module_stub(path.read_text()) for path in modules}}


if __name__ == "__main__":
    for old in PACKAGE.glob("*.pyi"):
        old.unlink()
    for name, text in stubs().items():
        (PACKAGE / name).write_text(text)
