"""Maximum likelihood for softmax-gated Gaussian mixtures of experts, and how fast the estimates converge.

The model is [`SoftmaxGaussianMoEForRegression`]; here are the scikit-learn style estimator around it, EM and L-BFGS,
Voronoi losses and rate studies. Papers: [2401.13875](https://huggingface.co/papers/2401.13875),
[2309.13850](https://huggingface.co/papers/2309.13850), [2305.03288](https://huggingface.co/papers/2305.03288).
"""

from hf_moe.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "FitResult": ".fitting",
        "GaussianMoEParameters": ".parameters",
        "RateExperiment": ".rate_experiment",
        "RateStudy": ".rate_study",
        "SoftmaxGaussianMoE": ".estimator",
        "Slope": ".rate_study",
        "align_gate": ".voronoi",
        "fit_em": ".expectation_maximization",
        "fit_lbfgs": ".lbfgs",
        "fisher_information": ".scores",
        "hellinger_distance": ".distances",
        "match_components": ".voronoi",
        "observation_scores": ".scores",
        "parameter_errors": ".distances",
        "plot_rates": ".rate_plot",
        "rate_study": ".rate_study",
        "voronoi_cells": ".voronoi",
        "voronoi_loss": ".voronoi",
    },
)
