"""A run's examples where --dataset_name names them: text files in the output folder, written by the first rank.

    settle_data(args)
    args.data.data_dir                  # OUT/dataset, as if --data_dir had named it

Nothing heavy is imported but, for a name on the hub that was not read before, `datasets`.
"""

from pathlib import Path

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
    folder, needed = Path(args.run.output_dir) / FOLDER, splits_read(args)
    if is_rank_zero():
        is_new = args.run.do_train and args.run.overwrite_output_dir
        may_replace = is_new or not (folder.parent / "hparams.json").is_file()
        written_folder(args.data, folder, needed, may_replace)
    else:
        awaited_folder(args.data, folder, needed, args.run.rank_timeout)
    args.data.data_dir = str(folder)
