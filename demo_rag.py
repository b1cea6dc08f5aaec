"""Ask a RAG model in the browser, and see why it answers so: the passages, and each one's part in the answer.

    python demo_rag.py --model_name_or_path output/quickstart/finetuned/checkpoint1 --index_name custom \\
        --passages_path output/quickstart/knowledge/my_knowledge_dataset \\
        --index_path output/quickstart/knowledge/my_knowledge_dataset_hnsw_index.faiss
    python demo_rag.py --model_name_or_path output/run/checkpoint1 --compare_with output/my_checkpoint ... --port 0

The page, http://127.0.0.1:7860/, shows the answer while it is searched for, the passages with their prior p(z|x) and
posterior p(z|x,y), of a RAG-Token model each passage's part in each token, and the passages of a question alone.
Number of passages, beams and the effort of the index's search are set there; nothing is loaded again.
http://127.0.0.1:7860/?q=where+is+oslo asks at once. It listens on this machine alone unless --host says otherwise, and
asks nobody for a password. Ctrl-C ends it.
"""

import webbrowser
from typing import NoReturn

from rag.command_line.script import run_script
from rag.demo.arguments import DemoArguments, path_problems
from rag.demo.arguments import parse_args as parse_demo_args
from rag.errors import raise_problems
from rag.models.trust import allow_code


def parse_args(argv: list[str] | None = None) -> DemoArguments:
    return parse_demo_args(argv, description=__doc__)


def opened(args: DemoArguments):
    """A `DemoServer` that listens and has its models; the port is taken before anything heavy is loaded."""
    raise_problems(path_problems(args))
    from rag.demo.page import render
    from rag.demo.server import open_server

    allow_code(args.trust_remote_code)
    server = open_server(args.host, args.port)
    try:
        from rag.demo.model import open_models

        server.models = open_models(args)
    except BaseException:
        server.server_close()
        raise
    server.page = render([model.description() for model in server.models], server.nonce)
    return server


def main(args: DemoArguments) -> None:
    """Serve the page until Ctrl-C."""
    server = opened(args)
    print(f"{server.url} shows {' and '.join(model.path for model in server.models)}; Ctrl-C ends it", flush=True)
    if args.open_browser:
        webbrowser.open(server.url)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("ended")
    finally:
        server.end()


def cli() -> NoReturn:
    """The command `rag-demo`."""
    run_script(parse_args, main)


if __name__ == "__main__":
    cli()
