"""The settings of `finetune_rag.py`: the suite's, and those of the Lightning Trainer that are plain data.

    args = parse_args(["--model_name_or_path", "rag", "--data_dir", "data", "--output_dir", "out", "--seed", "7"])
    args.data.train_batch_size, args.trainer.precision, args.to_dict()

Neither torch nor Lightning is imported, so that `--help` and a mistyped flag answer at once.
"""

import logging
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rag.command_line.flags import flag, required_flag, trust_flag
from rag.command_line.parser import RagArgumentParser
from rag.command_line.trainer_flags import TrainerArguments, add_trainer_flags
from rag.distributed.meeting import node_problems, port_problems, rank_problems
from rag.errors import UserError, raise_problems
from rag.index.arguments import SearchArguments
from rag.questions.arguments import DatasetArguments
from rag.retrieval.arguments import RerankArguments
from rag.training.flag_problems import contradictions, package_problems, range_problems, run_problems

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """What is trained."""

    _argument_group_name = "model"
    model_name_or_path: str = required_flag("Checkpoint to start from: a folder or a name on the hub.")
    model_type: Literal["rag_sequence", "rag_token", "fid", "bart", "t5", "causal", "auto"] | None = flag(
        None,
        "Left out, it is read from the checkpoint's config; fid is a Fusion-in-Decoder; bart, t5 and causal (a "
        "language model) train a bare, closed-book generator.",
    )
    config_name: str | None = flag(None, "Config to use instead of the checkpoint's: a folder or a name.")
    tokenizer_name: str | None = flag(None, "Tokenizer to use instead of the checkpoint's: a folder or a name.")
    cache_dir: str | None = flag(None, "Where downloads are kept; left out, the Hugging Face cache.")
    encoder_layerdrop: float | None = flag(None, "Probability of leaving out an encoder layer; the checkpoint's.")
    decoder_layerdrop: float | None = flag(None, "Probability of leaving out a decoder layer; the checkpoint's.")
    dropout: float | None = flag(None, "Dropout probability of the generator; left out, the checkpoint's.")
    attention_dropout: float | None = flag(None, "Dropout probability of its attention; left out, the checkpoint's.")
    label_smoothing: float = flag(0.0, "Share of the probability spread over the vocabulary; 0 is the plain loss.")
    freeze_question_encoder: bool = flag(False, "Leave the question encoder as it is: a remedy for collapse.")
    train_context_encoder: bool = flag(
        False,
        "Train the encoder of the passages, too: found passages are read and scored anew in each step: "
        "docs/training_the_retriever.md.",
    )
    context_encoder_name_or_path: str | None = flag(
        None, "That encoder: the one that made the index; left out, the one that the index names."
    )
    freeze_generator: bool = flag(
        False, "Leave the generator as it is, without dropout: the question encoder alone learns, through it."
    )
    freeze_embeds: bool = flag(False, "Leave the generator's word and position embeddings as they are.")
    lora_r: int | None = flag(
        None,
        "Train low-rank adapters of this rank beside the generator's linear layers (LoRA, by peft), which are frozen; "
        "left out, all of the generator. 8 to 64 are usual, at 10 times the learning rate.",
    )
    lora_alpha: float | None = flag(
        None, "Adapters are multiplied by alpha / r; left out, twice the rank: so the rank changes no learning rate."
    )
    lora_dropout: float = flag(0.0, "Dropout probability of what adapters read; few epochs need none.")
    lora_target_modules: list[str] | None = flag(
        None, "Layers of the generator that get adapters, by the ends of their names; all linear ones but the output's."
    )
    question_encoder_lora_r: int | None = flag(
        None, "The same for all linear layers of the question encoder; left out, all of it is trained."
    )
    load_in_4bit: bool = flag(
        False, "Hold the generator's frozen weights in 4 bits (bitsandbytes' NF4); with --lora_r, and on a GPU."
    )
    load_in_8bit: bool = flag(False, "Hold them in 8 bits (LLM.int8()); with --lora_r, and on a GPU.")
    gradient_checkpointing: bool = flag(
        False, "Recompute the generator's activations in the backward pass: less memory."
    )
    compile: bool = flag(
        False, "torch.compile the generator's layers, one of each kind: fewer kernels on a GPU; needs a C++ compiler."
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = flag(
        "auto",
        "auto reads all passages of a batch in one row without padding where the generator's family can (BART, T5); "
        "the others are transformers' own, over padded batches.",
    )

    @property
    def quantization(self) -> str | None:
        """In how many bits the generator's frozen weights are held; None for their own precision."""
        return "4bit" if self.load_in_4bit else "8bit" if self.load_in_8bit else None


@dataclass
class RetrievalArguments(SearchArguments, RerankArguments):
    """Where passages come from."""

    _argument_group_name = "retrieval"
    n_docs: int | None = flag(None, "Passages retrieved a question; left out, the checkpoint's.")
    max_combined_length: int | None = flag(None, "Tokens of passage and question together; the checkpoint's.")
    distributed_retriever: Literal["pytorch", "ray", "local"] = flag(
        "pytorch", "pytorch: process 0 searches for all; ray: Ray's processes do; local: each process for itself."
    )
    ray_address: str = flag("auto", "Address of the Ray cluster; auto finds the one on this machine.")
    num_retrieval_workers: int = flag(1, "Ray processes that hold the index; only with --distributed_retriever ray.")
    retrieval_worker_gpus: float = flag(0.0, "Share of a GPU for each of them, which then searches on it.")
    over_retrieve: int | None = flag(
        None,
        "Passages a question that are searched for, scored by the context encoder as it is now, and of which the best "
        "--n_docs are read; left out, --n_docs.",
    )
    refresh_index: str | None = flag(
        None,
        "When passages are embedded anew beside the training, as steps:interval, such as 0-1000:500,1000-:1000; left "
        "out, at the training's end alone.",
    )
    refresh_device: str | None = flag(
        None, "Where they are embedded: cpu, cuda:1, or ray for tasks on its cluster; left out, the CPU."
    )
    refresh_processes: int = flag(1, "Processes that embed them.")
    distributed_port: int = flag(-1, "Without effect: retrieval uses a group inside the running job, not a port.")


@dataclass
class DataArguments(DatasetArguments):
    """Examples and batches."""

    _argument_group_name = "data"
    data_dir: str | None = flag(
        None, "Folder of train|val|test .source and .target, one example a line; or give --dataset_name."
    )
    max_source_length: int = flag(128, "Question tokens kept; questions are short.")
    max_target_length: int = flag(25, "Answer tokens kept in training; answers are short.")
    val_max_target_length: int = flag(25, "Answer tokens kept and generated in validation; as in training.")
    test_max_target_length: int = flag(25, "Answer tokens kept and generated in the test; as in training.")
    n_train: int = flag(-1, "Training examples used, from the first; -1 is all.")
    n_val: int = flag(-1, "Validation examples used, from the first; -1 is all.")
    n_test: int = flag(-1, "Test examples used, from the first; -1 is all.")
    prefix: str = flag("", "Put before every question (T5: 'question: '); eval_rag.py must be given the same.")
    train_batch_size: int = flag(32, "Questions a process takes at a time in training.")
    eval_batch_size: int = flag(32, "Questions a process takes at a time in validation and test.")
    num_workers: int = flag(4, "Processes that read and tokenize ahead; 0 does it in the training process.")
    group_by_length: bool = flag(False, "Batches of questions of similar length: less padding, less random batches.")
    num_beams: int = flag(
        1, "Beams of generation in validation and test; 1 (greedy) is what Lewis et al. test question answering with."
    )
    dataset_digest: str | None = field(default=None, init=False)  # no flag: of the examples of --dataset_name

    @property
    def name(self) -> str:
        """What the data are called, and where they come from."""
        return self.dataset_name or self.folder

    @property
    def folder(self) -> str:
        """Where the text files are: --data_dir, or what --dataset_name was written to."""
        assert self.data_dir is not None, "checked by `require_sound`, or written by `finetune_rag.main`"
        return self.data_dir


@dataclass
class TrainingArguments:
    """How the weights change."""

    _argument_group_name = "training"
    learning_rate: float = flag(5e-5, "Peak learning rate.")
    question_encoder_learning_rate: float | None = flag(None, "The question encoder's; left out, --learning_rate.")
    context_encoder_learning_rate: float | None = flag(None, "The context encoder's; left out, --learning_rate.")
    decoder_learning_rate: float | None = flag(None, "The generator's decoder's; left out, --learning_rate.")
    lr_scheduler: Literal["linear", "cosine", "cosine_w_restarts", "polynomial"] = flag(
        "linear", "How the learning rate goes down after the warm-up."
    )
    warmup_steps: int = flag(0, "Optimizer steps over which the learning rate rises from 0.")
    retriever_loss: Literal["marginal", "emdr2", "pdist", "lsr", "loop", "adist"] = flag(
        "marginal",
        "What the question encoder learns from: marginal is the answer's own likelihood (of --model_type fid nothing); "
        "the others are losses of its own, with the generator's view of each passage as their teacher, adist with the "
        "attention of --model_type fid: docs/training_the_retriever.md.",
    )
    retriever_loss_weight: float = flag(1.0, "Times the retriever's own loss, beside the answer's.")
    retriever_temperature: float = flag(1.0, "The passages' scores are divided by it in the retriever's own loss.")
    teacher_temperature: float = flag(
        1.0,
        "The generator's log-likelihoods, or its attention, are divided by it: larger teaches more evenly. emdr2 has "
        "none.",
    )
    weight_decay: float = flag(0.0, "Decay a step, times the learning rate; never of biases and norms.")
    adam_epsilon: float = flag(1e-8, "Term that keeps AdamW from dividing by zero.")
    adafactor: bool = flag(False, "Adafactor instead of AdamW: less memory.")
    max_grad_norm: float = flag(
        1.0,
        "Gradients of a larger norm are scaled down to it; 0 leaves them. --gradient_clip_val is another name for it.",
        aliases=["--gradient_clip_val", "--gradient-clip-val"],
    )
    num_train_epochs: int = flag(
        3,
        "Times every training example is seen; --max_steps may end it earlier. --max_epochs is another name for it.",
        aliases=["--max_epochs", "--max-epochs"],
    )
    gradient_accumulation_steps: int = flag(
        1,
        "Batches whose gradients make one optimizer step. --accumulate_grad_batches is another name for it.",
        aliases=["--accumulate_grad_batches", "--accumulate-grad-batches"],
    )
    seed: int = flag(42, "Seed of the order of examples, of dropout and of new weights.")
    early_stopping_patience: int = flag(-1, "Validations without a better EM before training stops; -1 never stops.")
    nan_policy: Literal["stop", "skip"] = flag(
        "stop",
        "Of a step whose loss or gradients are not finite: stop, saved as it was before it; or leave it out and count.",
    )
    fp16: bool = flag(False, "Mixed precision with float16 (--precision 16-mixed); needs a GPU.")
    bf16: bool = flag(False, "Mixed precision with bfloat16 (--precision bf16-mixed).")
    fp16_opt_level: str | None = flag(
        None, "Without effect: it was Apex's, which torch's own mixed precision replaced."
    )


@dataclass
class RunArguments:
    """What is done, where it is written, on what it runs."""

    _argument_group_name = "run"
    output_dir: str = required_flag("Folder for checkpoints, metrics and logs.")
    overwrite_output_dir: bool = flag(False, "Remove the run that the folder holds and start afresh.")
    do_train: bool = flag(False, "Train; what happens when neither --do_train nor --do_predict is given.")
    do_predict: bool = flag(False, "Test the best checkpoint after training, or the model as it is without training.")
    resume_from_checkpoint: str | None = flag(
        None, "Lightning checkpoint to resume from; left out, --output_dir's last.ckpt, a new run where there is none."
    )
    save_interval: float = flag(
        30.0, "Minutes between writings of last.ckpt inside an epoch, which is the work a kill can cost; 0 is off."
    )
    report_to: list[str] | None = flag(
        None,
        "Where the log goes beside training_log.jsonl (jsonl), which is always written: csv, tensorboard, wandb, "
        "trackio, mlflow; several by commas or blanks.",
    )
    logger_name: Literal["default", "wandb", "wandb_shared"] = flag(
        "default",
        "wandb is another name for --report_to wandb, wandb_shared is that with the project hf_ and the name of "
        "the data; default leaves it to --report_to.",
    )
    rank_timeout: float = flag(
        600.0,
        "Seconds that a process waits for the others of its job before it ends with their number; a stopped or killed "
        "one of this machine is told within half a minute.",
    )
    trust_remote_code: bool = trust_flag()
    profile: bool = flag(False, "Write the time each part of the training took to --output_dir.")
    gpus: str | None = flag(
        None, "Number of GPUs (0 is the CPU, -1 all of them) or their numbers (0,1); left out, --accelerator decides."
    )
    num_processes: int | None = flag(
        None, "Processes that train on the CPU: another name for --accelerator cpu --devices N (Lightning 1)."
    )
    distributed_backend: Literal["ddp", "ddp_cpu", "ddp_spawn"] | None = flag(
        None,
        "Another name for --strategy ddp (ddp, ddp_spawn) and for --accelerator cpu (ddp_cpu), as of Lightning 1.",
    )
    n_tpu_cores: int | None = flag(None, "Without effect: use --accelerator tpu --devices N.")

    def __post_init__(self):
        self.do_train = self.do_train or not self.do_predict
        if self.report_to is not None:
            text = self.report_to if isinstance(self.report_to, str) else ",".join(self.report_to)
            self.report_to = [name for name in text.replace(" ", ",").split(",") if name]
        last = Path(self.output_dir) / "last.ckpt"
        if self.do_train and self.resume_from_checkpoint is None and not self.overwrite_output_dir and last.is_file():
            self.resume_from_checkpoint = str(last)

    @property
    def reports(self) -> list[str]:
        """Where the log goes, each once, jsonl first."""
        by_logger_name = [] if self.logger_name == "default" else ["wandb"]
        return list(dict.fromkeys(["jsonl", *(self.report_to or []), *by_logger_name]))


@dataclass
class FinetuneArguments:
    """All settings of a run, plain data."""

    model: ModelArguments
    retrieval: RetrievalArguments
    data: DataArguments
    training: TrainingArguments
    run: RunArguments
    trainer: TrainerArguments

    def to_dict(self) -> dict[str, Any]:
        """Every setting by its group, as JSON can hold it, but --trust_remote_code: each command gives that anew."""
        settings = asdict(self)
        del settings["run"]["trust_remote_code"]
        if self.data.dataset_name is not None:
            settings["data"]["data_dir"] = None  # it is the run's own folder, wherever that lies
        else:
            del settings["data"]["dataset_digest"]
        return settings


GROUPS = (ModelArguments, RetrievalArguments, DataArguments, TrainingArguments, RunArguments)


def parse_args(argv: list[str] | None = None, description: str | None = None) -> FinetuneArguments:
    """Read the command line; raises one `UserError` for all settings that are out of range or contradict each other."""
    parser = RagArgumentParser(*GROUPS, description=description)
    add_trainer_flags(parser.add_argument_group("Lightning Trainer"))
    model, retrieval, data, training, run, rest = parser.parse(argv)
    args = FinetuneArguments(model, retrieval, data, training, run, TrainerArguments(**vars(rest)))
    try:
        require_sound(args)
    except UserError as error:  # of a setting that has several names it names the first
        raise UserError(parser.in_given_names(str(error))) from None
    return args


def require_sound(args: FinetuneArguments) -> None:
    """Raise one `UserError` for all settings that are out of range or contradict each other."""
    raise_problems(range_problems(args) + contradictions(args) + package_problems(args.model) + run_problems(args.run))
    raise_problems(_launch_problems(args))
    for name, given in _flags_without_effect(args).items():
        logger.warning(f"--{name} {given} has no effect; see --help")


def _launch_problems(args: FinetuneArguments) -> list[str]:
    """Where the number of ranks is a flag's, and not that of the GPUs there are."""
    kwargs = trainer_kwargs(args)
    devices, nodes = kwargs["devices"], kwargs["num_nodes"]
    if problems := node_problems(nodes):
        return problems
    if not isinstance(devices, int) or devices < 1:
        return []
    ranks = devices * nodes
    return rank_problems(devices, nodes, ranks) + (port_problems() if nodes == 1 < ranks else [])


def _flags_without_effect(args: FinetuneArguments) -> dict[str, Any]:
    values = {
        "fp16_opt_level": args.training.fp16_opt_level,
        "n_tpu_cores": args.run.n_tpu_cores,
        "distributed_port": None if args.retrieval.distributed_port == -1 else args.retrieval.distributed_port,
    }
    return {flag: value for flag, value in values.items() if value is not None}


def trainer_kwargs(args: FinetuneArguments) -> dict[str, Any]:
    """The keyword arguments of `pl.Trainer` that are plain data: its own flags and the suite's names for some."""
    kwargs = asdict(args.trainer) | _device_settings(args.run)
    if args.training.fp16 or args.training.bf16:
        kwargs["precision"] = "16-mixed" if args.training.fp16 else "bf16-mixed"
    if kwargs["strategy"] == "auto" and (args.model.encoder_layerdrop or args.model.decoder_layerdrop):
        # A dropped layer gets no gradient, which DistributedDataParallel would otherwise wait for.
        kwargs["strategy"] = "ddp_find_unused_parameters_true"
    elif args.run.distributed_backend in ("ddp", "ddp_spawn"):
        kwargs["strategy"] = "ddp"
    if (ranks_on_node := os.environ.get("LOCAL_WORLD_SIZE")) is not None:  # torchrun has started the ranks
        if kwargs["devices"] == "auto":
            kwargs["devices"] = int(ranks_on_node)
        if kwargs["num_nodes"] == 1:
            kwargs["num_nodes"] = int(os.environ["WORLD_SIZE"]) // int(ranks_on_node)
    if kwargs["enable_model_summary"] is None:
        kwargs["enable_model_summary"] = False  # `GenerativeQAModule.setup` says how much learns
    if kwargs["enable_progress_bar"] is None:
        kwargs["enable_progress_bar"] = sys.stdout.isatty()  # in a log file, callbacks_rag.ProgressLines instead
    return kwargs | {
        "max_epochs": args.training.num_train_epochs,
        "accumulate_grad_batches": args.training.gradient_accumulation_steps,
        "gradient_clip_val": args.training.max_grad_norm,
        "default_root_dir": args.run.output_dir,
        "use_distributed_sampler": False,  # the data module splits by rank itself, each example exactly once
    }


def _device_settings(run: RunArguments) -> dict[str, Any]:
    """What --gpus, --num_processes and --distributed_backend say of the Trainer's accelerator and devices."""
    if run.gpus is not None and run.gpus.strip() != "0":
        return {"accelerator": "gpu", "devices": int(run.gpus) if "," not in run.gpus else run.gpus}
    if run.num_processes is not None:
        return {"accelerator": "cpu", "devices": run.num_processes}
    if run.gpus is not None:
        return {"accelerator": "cpu", "devices": 1}
    return {"accelerator": "cpu"} if run.distributed_backend == "ddp_cpu" else {}
