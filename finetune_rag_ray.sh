#!/usr/bin/env bash
# Finetune a RAG model while Ray processes hold the index and search it; the settings are those of finetune_rag.sh.
#
#   MODEL_NAME_OR_PATH=path/to/rag DATA_DIR=path/to/data OUTPUT_DIR=path/to/out ./finetune_rag_ray.sh \
#       --index_name custom --passages_path path/to/my_knowledge_dataset \
#       --index_path path/to/my_knowledge_dataset_hnsw_index.faiss --gpus 8 --fp16
#
# Where no Ray cluster runs, the job starts one of its own and stops it. To search on other machines, start one first
# (`ray start --head` here, `ray start --address HEAD:6379` there); it is found by its address, `auto`.
set -euo pipefail

"$(dirname "$0")/finetune_rag.sh" \
    --distributed_retriever ray \
    --num_retrieval_workers 4 \
    --ray-address auto \
    "$@"
