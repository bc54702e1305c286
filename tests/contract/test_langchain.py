"""LangChain's ``ChatOpenAI``, unchanged."""

from __future__ import annotations

from langchain_openai import ChatOpenAI

from tests.contract.conftest import Server


def test_invoke_and_stream(server: Server) -> None:
    chat = ChatOpenAI(
        model="small", base_url=server.v1, api_key="hr-analyst", max_retries=0, stream_usage=True
    )
    assert chat.invoke("hello").content == "Good morning"
    parts = list(chat.stream("hello"))
    assert "".join(str(part.content) for part in parts) == "Good morning"
    assert sum(p.usage_metadata["output_tokens"] for p in parts if p.usage_metadata) == 2
