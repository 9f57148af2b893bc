#!/bin/bash
# Nodes of 8 GPUs: sbatch --nodes 4 scripts/slurm/train.sh scripts/recipes/spatialvla_lora.yaml [--training.NAME VALUE]
#SBATCH --job-name=hf-vla
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
# Five minutes before the time is up this script is told: the training saves, and the job begins anew from there.
#SBATCH --signal=B:TERM@300
set -euo pipefail

export ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-scripts/accelerate/ddp.yaml}
MAIN_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_NODE OMP_NUM_THREADS=4
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=270  # seconds that a launcher gives its processes to save; 30 by default

# One launcher on each node, which alone knows its SLURM_NODEID. The folder of the output is one that all nodes share.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch \
  --config_file "$ACCELERATE_CONFIG" --num_machines "$SLURM_NNODES" --num_processes "$((8 * SLURM_NNODES))" \
  --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_NODE" --main_process_port 29500 \
  scripts/train.py --config "$@"' train "$@" --training.resume_from_checkpoint true &
training=$!

told=false
trap 'told=true; kill -TERM "$training"' TERM
wait "$training" && status=0 || status=$?
if $told; then  # the trap ended the first wait
  wait "$training" || true
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
