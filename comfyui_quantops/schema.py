"""The same nodes for ComfyUI's V3 interface, made from their V1 definitions when ComfyUI asks for them."""

from __future__ import annotations

from typing import Any

from .nodes import NODES


async def comfy_entrypoint() -> Any:
    """ComfyUI's V3 entry point: an extension with all nodes of the pack."""
    from comfy_api.latest import ComfyExtension

    class StreamquantExtension(ComfyExtension):
        async def get_node_list(self) -> list[type]:
            return [node_class(node) for node in NODES]

    return StreamquantExtension()


def node_class(node: type) -> type:
    """A V3 node that shows and does what the V1 class `node` does."""
    from comfy_api.latest import io

    class Node(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> Any:
            return io.Schema(
                node_id=node.NODE_ID,
                display_name=node.DISPLAY_NAME,
                category=node.CATEGORY,
                description=node.DESCRIPTION,
                inputs=_inputs(io, node.INPUT_TYPES()),
                outputs=[_output(io, kind) for kind in node.RETURN_TYPES],
                is_output_node=getattr(node, "OUTPUT_NODE", False),
            )

        @classmethod
        def fingerprint_inputs(cls, **given: Any) -> Any:
            changed = getattr(node, "IS_CHANGED", None)
            return changed(**given) if changed else None

        @classmethod
        def execute(cls, **given: Any) -> Any:
            result = getattr(node(), node.FUNCTION)(**given)
            if isinstance(result, dict):
                return io.NodeOutput(*result.get("result", ()), ui=result.get("ui"))
            return io.NodeOutput(*result)

    Node.__name__ = Node.__qualname__ = node.__name__
    return Node


def _inputs(io: Any, declared: dict[str, dict[str, Any]]) -> list[Any]:
    return [
        _input(io, name, *entry, optional=section == "optional")
        for section in ("required", "optional")
        for name, entry in declared.get(section, {}).items()
    ]


def _input(io: Any, name: str, kind: Any, options: dict[str, Any] | None = None, *, optional: bool) -> Any:
    """One input: `kind` and `options` as V1 declares them."""
    options = dict(options or {}) | {"optional": optional}
    if isinstance(kind, list):
        return io.Combo.Input(name, options=kind, **options)
    return _kinds(io)[kind].Input(name, **options)


def _output(io: Any, kind: str) -> Any:
    return _kinds(io)[kind].Output()


def _kinds(io: Any) -> dict[str, Any]:
    return {
        "MODEL": io.Model,
        "CLIP": io.Clip,
        "STRING": io.String,
        "BOOLEAN": io.Boolean,
        "INT": io.Int,
        "FLOAT": io.Float,
    }
