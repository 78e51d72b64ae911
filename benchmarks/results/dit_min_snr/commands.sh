# Makes the records of dit_min_snr: bash benchmarks/results/dit_min_snr/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.

python benchmarks/compare.py --config benchmarks/recipes/dit_min_snr.yaml --output-dir runs/compare/dit_min_snr --images 0 --seeds 0 1 2 --arms \
  "full lr*2=--optim.lr 1.6e-2" \
  full \
  "importance@0.65 lr^0.5=--pruning.policy importance --pruning.budget 0.65 --optim.compensation 0.5" \
  "importance@0.65=--pruning.policy importance --pruning.budget 0.65" \
  "levels@0.65 lr^0.5=--pruning.policy importance --pruning.over levels --pruning.budget 0.65 --optim.compensation 0.5" \
  "shortened@0.5 lr*1.00=--epochs 10 --optim.lr 8e-3" \
  "shortened@0.5 lr*2.00=--epochs 10 --optim.lr 1.6e-2" \
  "shortened@0.65 lr*1.00=--epochs 13 --optim.lr 8e-3" \
  "shortened@0.65 lr*2.00=--epochs 13 --optim.lr 1.6e-2"

python benchmarks/compare.py --config benchmarks/recipes/dit_min_snr.yaml --output-dir runs/compare/dit_min_snr --images 0 --seeds 0 1 --arms \
  "full lr*0.5=--optim.lr 4e-3" \
  "shortened@0.65 lr*0.50=--epochs 13 --optim.lr 4e-3"
