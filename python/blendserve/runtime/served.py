"""Which endpoints a batch line may have on this server: what its model can answer."""

from __future__ import annotations

from typing import Any

from sglang.srt.entrypoints.openai.protocol import V1RerankReqInput

# How SGLang names the architectures whose answer is a number for each label.
_LABELLING = ("SequenceClassification", "RewardModel")
# Those that read a pair of texts (SGLang's `_cross_encoding_pooler_archs`).
_CROSS_ENCODERS = frozenset(
    {"BertForSequenceClassification", "XLMRobertaForSequenceClassification"}
)


def served_endpoints(app: Any, tokenizer_manager: Any) -> frozenset[str]:
    """Urls of the endpoints that answer with this model.

    Args:
        app: SGLang's HTTP application, whose state holds its handlers.
        tokenizer_manager: SGLang's tokenizer manager.
    """
    config = tokenizer_manager.model_config.hf_config
    architectures = [str(name) for name in getattr(config, "architectures", None) or ()]
    labels = any(word in name for name in architectures for word in _LABELLING)
    if tokenizer_manager.is_generation:
        served = {"/v1/chat/completions", "/v1/completions", "/v1/score"}
        # SGLang serves these only where its handler could be made, which it is at the start.
        if hasattr(app.state, "openai_serving_responses"):
            served.add("/v1/responses")
        if _reranks_with_a_template(app):
            served.add("/v1/rerank")
        return frozenset(served)
    served = {"/v1/embeddings"}
    if labels:
        served |= {"/v1/classify", "/v1/score"}
    if _CROSS_ENCODERS.intersection(architectures):
        served.add("/v1/rerank")
    return frozenset(served)


def _reranks_with_a_template(app: Any) -> bool:
    """Whether the chat template is a reranker's, as SGLang's own handler tells: it then keeps the
    request to score it, and otherwise makes pairs for a cross encoder of it."""
    handler = getattr(app.state, "openai_serving_rerank", None)
    if handler is None:
        return False
    probe = V1RerankReqInput(query="a", documents=["b"])
    try:
        made, _ = handler._convert_to_internal_request(probe, None)
    except Exception:
        # Of any type: a tokenizer without a template, or none at all.
        return False
    return made is probe
