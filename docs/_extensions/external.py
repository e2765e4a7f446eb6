"""References to the few names of Python and torch that occur in signatures.

Replaces intersphinx, so that the site can be built without a network. A name that is not listed
here is an error, like any reference without a target.
"""

from __future__ import annotations

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

PYTHON = "https://docs.python.org/3/library"
TORCH = "https://docs.pytorch.org/docs/stable"

ADDRESSES = {
    "collections.abc.Callable": f"{PYTHON}/collections.abc.html#collections.abc.Callable",
    "collections.abc.Hashable": f"{PYTHON}/collections.abc.html#collections.abc.Hashable",
    "collections.abc.Mapping": f"{PYTHON}/collections.abc.html#collections.abc.Mapping",
    "collections.abc.Sequence": f"{PYTHON}/collections.abc.html#collections.abc.Sequence",
    "contextlib.AbstractContextManager": f"{PYTHON}/contextlib.html"
    "#contextlib.AbstractContextManager",
    "os.PathLike": f"{PYTHON}/os.html#os.PathLike",
    "torch.Tensor": f"{TORCH}/tensors.html#torch.Tensor",
    "torch.Size": f"{TORCH}/size.html#torch.Size",
    "torch.dtype": f"{TORCH}/tensor_attributes.html#torch.dtype",
    "torch.device": f"{TORCH}/tensor_attributes.html#torch.device",
    "torch.nn.Module": f"{TORCH}/generated/torch.nn.Module.html",
    "torch.optim.Optimizer": f"{TORCH}/optim.html#torch.optim.Optimizer",
}
# torch documents these classes under other names than those of their modules.
ALIASES = {
    "Tensor": "torch.Tensor",
    "torch.nn.modules.module.Module": "torch.nn.Module",
    "torch.optim.optimizer.Optimizer": "torch.optim.Optimizer",
}


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.Node | None:
    """A link to the documentation of the name; None if the name is not listed here."""
    target = node["reftarget"]
    address = ADDRESSES.get(ALIASES.get(target, target))
    if node.get("refdomain") != "py" or address is None:
        return None
    return nodes.reference("", "", content, internal=False, refuri=address)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True}
