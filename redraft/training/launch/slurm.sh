#!/bin/bash
# One training run over several nodes. Copy this file, replace the words in capitals, and run: sbatch slurm.sh
#SBATCH --job-name=redraft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log
set -euo pipefail

RECIPE=llada-sft
OUT=runs/$RECIPE
KIND=fsdp2  # ddp, fsdp2 or deepspeed
GPUS_PER_NODE=8
BATCH=64  # windows of a forward pass of all GPUs together: a multiple of their number

CONFIG=$(python -c "from redraft.training.launch import config_file; print(config_file('$KIND'))")
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)  # head would end the pipe early, an error here
RESUME=$([ -f "$OUT/recipe.json" ] && echo --resume || true)  # a job that was requeued goes on
export CONFIG HEAD RESUME RECIPE OUT GPUS_PER_NODE BATCH

srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch \
  --config_file "$CONFIG" \
  --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * GPUS_PER_NODE)) \
  --machine_rank "$SLURM_NODEID" --main_process_ip "$HEAD" --main_process_port 29500 \
  --module redraft.cli train "$RECIPE" --out "$OUT" --train.batch-size "$BATCH" $RESUME'
