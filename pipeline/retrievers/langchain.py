"""An artifact as a LangChain retriever: ``pip install vecmill[langchain]``."""

from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict

from pipeline.client import Artifact
from pipeline.retrievers.fields import metadata_of
from pipeline.search.searcher import Mode


class VecmillRetriever(BaseRetriever):
    """The documents nearest to a query, each by its best passage; what is None is as the artifact's config says.

    ``artifact``: of ``pipeline.open_artifact`` or ``open_root``. ``filter``: see pipeline.search.filters.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)
    artifact: Artifact
    k: int | None = None
    mode: Mode | None = None
    filter: dict[str, Any] | None = None

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        hits = self.artifact.search(query, self.k, mode=self.mode, filter=self.filter)
        return [Document(id=hit.doc_id, page_content=hit.text, metadata=metadata_of(hit)) for hit in hits]
