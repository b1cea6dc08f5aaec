#!/usr/bin/env bash
# Finetune a RAG model on one node; rank 0 searches for all ranks (--distributed_retriever pytorch).
#
#   MODEL_NAME_OR_PATH=path/to/rag DATA_DIR=path/to/data OUTPUT_DIR=path/to/out ./finetune_rag.sh \
#       --index_name custom --passages_path path/to/my_knowledge_dataset \
#       --index_path path/to/my_knowledge_dataset_hnsw_index.faiss --gpus 8 --fp16
#
# Whatever is given behind the name wins over the settings below, which are a start for question answering with a large
# generator. Two nodes: on each, without --gpus, LAUNCH="torchrun --nnodes 2 --nproc_per_node 8 ..." before the name.
set -euo pipefail

${LAUNCH:-python} "$(dirname "$0")/finetune_rag.py" \
    --model_name_or_path "${MODEL_NAME_OR_PATH:?a RAG checkpoint; consolidate_rag_checkpoint.py makes one}" \
    --data_dir "${DATA_DIR:?the folder of train|val|test .source and .target}" \
    --output_dir "${OUTPUT_DIR:?the folder to write to}" \
    --do_train --do_predict \
    --train_batch_size 8 --eval_batch_size 8 \
    --max_source_length 128 --max_target_length 25 \
    --val_max_target_length 25 --test_max_target_length 25 \
    --learning_rate 3e-05 --lr_scheduler polynomial --warmup_steps 500 \
    --num_train_epochs 100 --early_stopping_patience 10 \
    --weight_decay 0.001 --max_grad_norm 0.1 \
    --label_smoothing 0.1 --dropout 0.1 \
    "$@"
