#!/bin/bash
# Eight nodes of eight GPUs: one torchrun a node. Copies over the nodes, split within each.
# A node that dies, or the end of the time limit, loses nothing: the job is queued again and goes on.
#SBATCH --job-name=crnet-1b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=8

# Five minutes before the end, and when it is cancelled: every process saves and stops.
trap 'scancel --signal=TERM "$SLURM_JOB_ID".0; wait; scontrol requeue "$SLURM_JOB_ID"' TERM

srun torchrun \
  --nnodes="$SLURM_NNODES" --nproc-per-node=8 --max-restarts=3 \
  --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head_node:29500" \
  -m crnet train llama-1b --model.linear crnet \
  --data.source c4 --data.cache-dir "$SCRATCH/crnet-cache" \
  --parallel.data 8 --parallel.shard 8 --parallel.checkpoint parts \
  --resume auto --out "$SCRATCH/runs/llama-1b-crnet" &
wait
