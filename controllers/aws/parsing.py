"""How botocore reads AWS's answers without stopping everything else.

A page of 1,000 instances parsed in one piece stops every other thread for 0.1 s; in pieces it lets them in between.
Called by `controllers.aws.accounts`, whose sessions have these parsers.
"""

from __future__ import annotations

from typing import Any
from xml.etree.ElementTree import ParseError, TreeBuilder, XMLParser

from botocore.parsers import (
    EC2QueryParser,
    QueryParser,
    ResponseParserError,
    ResponseParserFactory,
    RestXMLParser,
)

_PIECE = 32 * 1024


class Parsers(ResponseParserFactory):
    """Parsers that read XML in pieces."""

    def create_parser(self, protocol_name: str) -> Any:
        parser: Any = super().create_parser(protocol_name)
        if type(parser) in (QueryParser, EC2QueryParser, RestXMLParser):
            parser._parse_xml_string_to_dom = _dom  # noqa: SLF001 - botocore has no other door
        return parser


def _dom(document: bytes) -> Any:
    parser = XMLParser(target=TreeBuilder(), encoding="utf-8")  # noqa: S314 - as botocore itself reads AWS's answers
    try:
        for start in range(0, len(document), _PIECE):
            parser.feed(document[start : start + _PIECE])
        return parser.close()
    except ParseError as error:
        raise ResponseParserError(f"the answer is no XML: {error}") from error
