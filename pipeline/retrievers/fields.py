"""What a hit tells beside its text, for any framework."""

import json
from typing import Any

from pipeline.search.searcher import Hit


def metadata_of(hit: Hit) -> dict[str, Any]:
    """The document's metadata, and where the passage is from."""
    known = json.loads(hit.metadata) if hit.metadata else {}
    place = {"doc_id": hit.doc_id, "passage": hit.passage, "span": [hit.start, hit.end]}
    return known | place | {"source": f"{hit.source_uri}:{hit.source_row}", "score": hit.score}
