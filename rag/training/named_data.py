"""A run's examples where --dataset_name names them: text files in the output folder, written by the first rank.

    settle_data(args)
    args.data.data_dir                  # a folder in OUT/dataset, as if --data_dir had named it

Nothing heavy is imported but, for a name on the hub that was not read before, `datasets`.
"""

from pathlib import Path

from rag.files import read_state, remove
from rag.questions.folder import awaited_folder, written_folder
from rag.training.arguments import FinetuneArguments
from rag.training.run_folder import is_rank_zero

FOLDER = "dataset"


def splits_read(args: FinetuneArguments) -> list[str]:
    """Those whose files are read."""
    return (["train", "val"] if args.run.do_train else []) + (["test"] if args.run.do_predict else [])


def settle_data(args: FinetuneArguments) -> None:
    """Have `args.data.data_dir` name the files of --dataset_name, if that is given.

    A run that goes on takes what it has written. Every rank calls this; the others wait for the first one.

    Raises:
        UserError: the data set cannot be read, or is another one than the run in the folder was begun with.
        RankError: the first rank's files do not appear.
    """
    if args.data.dataset_name is None:
        return
    parent, needed = Path(args.run.output_dir) / FOLDER, splits_read(args)
    if is_rank_zero():
        expected = digest_of_run(args)
        folder, digest = written_folder(args.data, parent, needed, expected)
        for other in parent.iterdir() if expected is not None else ():  # of a start that was refused, or an older run
            if other != folder:
                remove(other)
    else:
        folder, digest = awaited_folder(args.data, parent, needed, args.run.rank_timeout)
    args.data.data_dir, args.data.dataset_digest = str(folder), digest


def digest_of_run(args: FinetuneArguments) -> str | None:
    """Of the examples of the run that --output_dir holds and that is not to be removed; None where there is none."""
    description = Path(args.run.output_dir) / "hparams.json"
    if (args.run.do_train and args.run.overwrite_output_dir) or not description.is_file():
        return None
    data = read_state(description, "give another --output_dir, or --overwrite_output_dir to begin anew").get("data")
    return data.get("dataset_digest") if isinstance(data, dict) else None
