# Makes the records of coreset: bash benchmarks/results/coreset/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.

python benchmarks/compare.py --config benchmarks/recipes/coreset.yaml --output-dir runs/compare/coreset --seeds 0 1 2 --arms \
  "full=--optim.lr 2e-3" \
  "shortened@0.2 lr*1.00=--epochs 4 --optim.lr 2e-3" \
  "shortened@0.3 lr*0.50=--epochs 6 --optim.lr 1e-3" \
  "shortened@0.3 lr*1.00=--epochs 6 --optim.lr 2e-3" \
  "shortened@0.45 lr*1.00=--epochs 9 --optim.lr 2e-3"

python benchmarks/compare.py --config benchmarks/recipes/coreset.yaml --output-dir runs/compare/coreset --seeds 0 --arms \
  "full lr*2=--optim.lr 4e-3" \
  "graphcut lr*2.00=--data.subset runs/coresets/graphcut-0.json --optim.lr 4e-3" \
  "graphcut-pruned lr*2.00=--data.subset runs/coresets/graphcut-0.json --pruning.policy infobatch --optim.lr 4e-3" \
  "graphcut-pruned=--data.subset runs/coresets/graphcut-0.json --pruning.policy infobatch --optim.lr 2e-3" \
  "graphcut=--data.subset runs/coresets/graphcut-0.json --optim.lr 2e-3" \
  "kcenter lr*2.00=--data.subset runs/coresets/kcenter-0.json --optim.lr 4e-3" \
  "kcenter-pruned lr*2.00=--data.subset runs/coresets/kcenter-0.json --pruning.policy infobatch --optim.lr 4e-3" \
  "kcenter-pruned=--data.subset runs/coresets/kcenter-0.json --pruning.policy infobatch --optim.lr 2e-3" \
  "kcenter=--data.subset runs/coresets/kcenter-0.json --optim.lr 2e-3" \
  "random lr*0.50=--data.subset runs/coresets/random-0.json --optim.lr 1e-3" \
  "random lr*2.00=--data.subset runs/coresets/random-0.json --optim.lr 4e-3" \
  "random-pruned lr*2.00=--data.subset runs/coresets/random-0.json --pruning.policy infobatch --optim.lr 4e-3" \
  "random-pruned=--data.subset runs/coresets/random-0.json --pruning.policy infobatch --optim.lr 2e-3" \
  "random=--data.subset runs/coresets/random-0.json --optim.lr 2e-3" \
  "shortened@0.2 lr*2.00=--epochs 4 --optim.lr 4e-3" \
  "shortened@0.3 lr*2.00=--epochs 6 --optim.lr 4e-3" \
  "shortened@0.45 lr*2.00=--epochs 9 --optim.lr 4e-3" \
  "stratified lr*2.00=--data.subset runs/coresets/stratified-0.json --optim.lr 4e-3" \
  "stratified-pruned lr*2.00=--data.subset runs/coresets/stratified-0.json --pruning.policy infobatch --optim.lr 4e-3" \
  "stratified-pruned=--data.subset runs/coresets/stratified-0.json --pruning.policy infobatch --optim.lr 2e-3" \
  "stratified=--data.subset runs/coresets/stratified-0.json --optim.lr 2e-3"

python benchmarks/compare.py --config benchmarks/recipes/coreset.yaml --output-dir runs/compare/coreset --seeds 1 --arms \
  "graphcut-pruned=--data.subset runs/coresets/graphcut-1.json --pruning.policy infobatch --optim.lr 2e-3" \
  "graphcut=--data.subset runs/coresets/graphcut-1.json --optim.lr 2e-3" \
  "kcenter-pruned=--data.subset runs/coresets/kcenter-1.json --pruning.policy infobatch --optim.lr 2e-3" \
  "kcenter=--data.subset runs/coresets/kcenter-1.json --optim.lr 2e-3" \
  "random lr*0.50=--data.subset runs/coresets/random-1.json --optim.lr 1e-3" \
  "random-pruned=--data.subset runs/coresets/random-1.json --pruning.policy infobatch --optim.lr 2e-3" \
  "random=--data.subset runs/coresets/random-1.json --optim.lr 2e-3" \
  "stratified-pruned=--data.subset runs/coresets/stratified-1.json --pruning.policy infobatch --optim.lr 2e-3" \
  "stratified=--data.subset runs/coresets/stratified-1.json --optim.lr 2e-3"

python benchmarks/compare.py --config benchmarks/recipes/coreset.yaml --output-dir runs/compare/coreset --seeds 2 --arms \
  "graphcut-pruned=--data.subset runs/coresets/graphcut-2.json --pruning.policy infobatch --optim.lr 2e-3" \
  "graphcut=--data.subset runs/coresets/graphcut-2.json --optim.lr 2e-3" \
  "kcenter-pruned=--data.subset runs/coresets/kcenter-2.json --pruning.policy infobatch --optim.lr 2e-3" \
  "kcenter=--data.subset runs/coresets/kcenter-2.json --optim.lr 2e-3" \
  "random lr*0.50=--data.subset runs/coresets/random-2.json --optim.lr 1e-3" \
  "random-pruned=--data.subset runs/coresets/random-2.json --pruning.policy infobatch --optim.lr 2e-3" \
  "random=--data.subset runs/coresets/random-2.json --optim.lr 2e-3" \
  "stratified-pruned=--data.subset runs/coresets/stratified-2.json --pruning.policy infobatch --optim.lr 2e-3" \
  "stratified=--data.subset runs/coresets/stratified-2.json --optim.lr 2e-3"
