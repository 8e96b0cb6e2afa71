"""Formulas as MathML, which browsers show by themselves: no script, no font to be fetched."""

import re

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


def converted(node: nodes.Node, display: str) -> str:
    """The formula of a math node as a <math> element; a warning for what is not understood."""
    latex = node.astext()
    result = latex2mathml.converter.convert(latex, display=display)
    unknown = re.findall(r"\\[a-zA-Z]+", result)
    if unknown:
        logger.warning("No MathML for %s in %r", ", ".join(unknown), latex, location=node)
    return result


def visit_inline(translator, node: nodes.math) -> None:
    translator.body.append(converted(node, "inline"))
    raise nodes.SkipNode


def visit_block(translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math-block">{converted(node, "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
