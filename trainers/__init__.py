"""Trainers, their configurations and callbacks; imported as `hf_moe.trainers`, each name on first use.

What becomes of the router losses of a model of hf_moe:

| trainer | balance loss | z-loss, `balance_mode`, selection biases |
|---|---|---|
| `MoeTrainer`, `MoeSFTTrainer`, `MoeDPOTrainer`, `MoEDistillationTrainer` | ours, once per optimizer step | yes |
| stock `Trainer` | ours, added by the model's `forward` | z-loss; the others with `GlobalBalanceCallback` |
| stock `SFTTrainer`, `DPOTrainer` | Mixtral's formula, each micro-batch by itself | no |

TRL never calls the model's `forward`. Its formula takes the softmax and the top-k of the feed-forward experts' logits,
whatever the router does, and pools the layers, which must therefore all have the same number of experts.

`ExpertUnlearningTrainer` uses no router loss: it would pull the routers away from the experts that are to forget.
"""

from hf_moe.lazy import lazy_exports


# public name -> the module of this folder that defines it
_EXPORTS: dict[str, str] = {
    "ClipCollator": ".contrastive_stages",
    "ClipMoeConfig": ".clip_moe_config",
    "ClusterBatchSampler": ".contrastive_clusters",
    "ContrastiveConfig": ".contrastive_config",
    "ContrastiveTrainer": ".contrastive_trainer",
    "DenoisingCollator": ".denoising",
    "GuidanceDistillationConfig": ".guidance_distillation_config",
    "GuidanceDistillationTrainer": ".guidance_distillation_trainer",
    "EvoMoEConfig": ".evomoe_config",
    "EvoMoETrainingArguments": ".evomoe_config",
    "ExpertUnlearningConfig": ".unlearning_config",
    "ExpertUnlearningTrainer": ".unlearning_trainer",
    "GenericStatistics": ".local_expert_statistics",
    "LocalExpertTrainer": ".local_expert_trainer",
    "LocalExpertTrainingArguments": ".local_expert_config",
    "MimicDistillationConfig": ".mimic_distillation_config",
    "MimicDistillationTrainer": ".mimic_distillation_trainer",
    "MixdaPromptCollator": ".mixda_collators",
    "MixdaTextCollator": ".mixda_collators",
    "MixdaTrainer": ".mixda_trainer",
    "MixdaTrainingArguments": ".mixda_config",
    "MoEDistillationConfig": ".moe_distillation_config",
    "MoEDistillationTrainer": ".moe_distillation_trainer",
    "MoeDPOConfig": ".dpo_config",
    "MoeDPOTrainer": ".dpo_trainer",
    "MoeSFTConfig": ".sft_config",
    "MoeSFTTrainer": ".sft_trainer",
    "MoeSeq2SeqTrainer": ".seq2seq_trainer",
    "MoeSeq2SeqTrainingArguments": ".seq2seq_trainer",
    "MoeTrainer": ".moe_trainer",
    "MoeTrainerMixin": ".moe_mixin",
    "MoeTrainingArguments": ".moe_config",
    "MoeTuningConfig": ".moe_tuning_config",
    "MoeTuningStageCallback": ".moe_tuning",
    "MosaMergeCallback": ".mosa_callback",
    "MosaTrainer": ".mosa_trainer",
    "MosaTrainerMixin": ".mosa_mixin",
    "MoteTrainer": ".mote_trainer",
    "PillStageCallback": ".pill_callback",
    "PreferenceDistillationConfig": ".preference_distillation_config",
    "PreferenceDistillationTrainer": ".preference_distillation_trainer",
    "ReadMeTrainer": ".read_me_trainer",
    "ReadMeTrainingArguments": ".read_me_config",
    "RouterLossCollector": ".router_losses",
    "StagedDistillationArguments": ".staged_distillation_config",
    "StagedDistillationConfig": ".staged_distillation_config",
    "StagedDistillationMixin": ".staged_distillation_mixin",
    "StagedDistillationTrainer": ".staged_distillation_trainer",
    "UniMoeCollator": ".uni_moe_collator",
    "UniMoeTrainingArguments": ".uni_moe_config",
    "UnlearningStep": ".unlearning_losses",
    "fill_spans": ".denoising",
    "cluster_pairs": ".contrastive_clusters",
    "contrastive_loss": ".contrastive_losses",
    "encode_pairs": ".contrastive_stages",
    "multistage_contrastive_learning": ".contrastive_stages",
    "retrieval_recall": ".contrastive_losses",
    "train_clip_moe": ".clip_moe",
    "train_part": ".contrastive_trainer",
    "zero_shot_accuracy": ".contrastive_losses",
    "hidden_state_discrepancy": ".distillation_losses",
    "chunked_divergence": ".chunked_divergence",
    "interleave_tasks": ".denoising",
    "kto_pair_loss": ".preference_distillation_trainer",
    "mask_spans": ".denoising",
    "moe_tuning_trainer": ".moe_tuning_trainer",
    "optimizer_groups": ".parameter_groups",
    "parameter_roles": ".parameter_groups",
    "set_moe_tuning_stage": ".moe_tuning",
    "set_uni_moe_stage": ".uni_moe_stages",
    "temperature_sampling": ".denoising",
    "train_uni_moe": ".uni_moe_phases",
    "train_only_experts": ".mote_trainer",
    "pill_learning_rate": ".pill_schedule",
    "pill_schedule": ".pill_schedule",
    "train_evomoe": ".evomoe",
    "prediction_discrepancy": ".distillation_losses",
    "evaluate_at_k": ".slimming",
    "uni_moe_lora_config": ".uni_moe_stages",
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)
