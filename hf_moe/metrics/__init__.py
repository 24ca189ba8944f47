"""Metrics as `evaluate.Metric` classes that work without the Hub: instantiate them, or load their file by path."""

from hf_moe.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "BalanceViolation": ".balance_violation",
        "ExpertLoad": ".expert_load",
        "Perplexity": ".perplexity",
        "RoutingEntropy": ".routing_entropy",
        "active_flops": "..active_compute",
        "causal_lm_metrics": ".trainer",
        "evaluation_results": ".results",
        "keep_token_losses": ".trainer",
        "marginal_entropy": ".summary",
        "summarize_assignments": ".summary",
        "summarize_probabilities": ".summary",
        "token_losses": ".losses",
    },
)
