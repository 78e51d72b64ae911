# Makes the records of grpo: bash benchmarks/results/grpo/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.

python benchmarks/compare_examples.py --program examples/group_policy.py --output-dir runs/compare/grpo --seed-flag seed --warm-models runs/grpo_warm --seeds 0 1 2 --arms \
  "cppo@0.5 lr*2.00=--pruning.rule cppo --lr 4e-4" \
  "dppo@0.5 lr*2.00=--pruning.rule dppo --pruning.prompts 0.5 --lr 4e-4" \
  "full lr*2=--lr 4e-4" \
  "full=--lr 2e-4" \
  "nonzero lr*2.00=--pruning.rule nonzero --lr 4e-4" \
  "proportional@0.5 lr*2.00=--pruning.rule proportional --lr 4e-4" \
  "random@0.5 lr*2.00=--pruning.rule random --lr 4e-4" \
  "shortened@0.4 lr*1.00=--epochs 2 --lr 2e-4" \
  "shortened@0.4 lr*2.00=--epochs 2 --lr 4e-4" \
  "shortened@0.6 lr*1.00=--epochs 3 --lr 2e-4" \
  "shortened@0.6 lr*2.00=--epochs 3 --lr 4e-4"

python benchmarks/compare_examples.py --program examples/group_policy.py --output-dir runs/compare/grpo --seed-flag seed --warm-models runs/grpo_warm --seeds 0 --arms \
  "cppo@0.5=--pruning.rule cppo --lr 2e-4" \
  "dppo@0.5=--pruning.rule dppo --pruning.prompts 0.5 --lr 2e-4" \
  "full lr*4=--lr 8e-4" \
  "nonzero lr*4.00=--pruning.rule nonzero --lr 8e-4" \
  "nonzero=--pruning.rule nonzero --lr 2e-4" \
  "proportional@0.5=--pruning.rule proportional --lr 2e-4" \
  "random@0.5=--pruning.rule random --lr 2e-4" \
  "shortened@0.4 lr*4.00=--epochs 2 --lr 8e-4" \
  "shortened@0.6 lr*4.00=--epochs 3 --lr 8e-4"
