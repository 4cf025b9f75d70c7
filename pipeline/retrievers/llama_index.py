"""An artifact as a LlamaIndex retriever: ``pip install vecmill[llama-index]``."""

from typing import Any

from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from pipeline.client import Artifact
from pipeline.retrievers.fields import metadata_of
from pipeline.search.searcher import Mode


class VecmillRetriever(BaseRetriever):  # type: ignore[misc] # its package has no types here
    """The documents nearest to a query, each by its best passage; what is None is as the artifact's config says.

    ``artifact``: of ``pipeline.open_artifact`` or ``open_root``. ``filter``: see pipeline.search.filters.
    """

    def __init__(
        self,
        artifact: Artifact,
        k: int | None = None,
        *,
        mode: Mode | None = None,
        filter: dict[str, Any] | None = None,  # noqa: A002
    ) -> None:
        super().__init__()
        self._artifact = artifact
        self._how: dict[str, Any] = {"k": k, "mode": mode, "filter": filter}

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        hits = self._artifact.search(query_bundle.query_str, **self._how)
        nodes = [
            TextNode(id_=hit.doc_id, text=hit.text, start_char_idx=hit.start, end_char_idx=hit.end, metadata=metadata_of(hit))
            for hit in hits
        ]
        return [NodeWithScore(node=node, score=hit.score) for node, hit in zip(nodes, hits, strict=True)]
