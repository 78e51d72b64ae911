# Makes the records of dit_cosine: bash benchmarks/results/dit_cosine/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.

python benchmarks/compare.py --config benchmarks/recipes/dit_cosine.yaml --output-dir runs/compare/dit_cosine --seeds 0 1 2 --arms \
  "full lr*1.5=--optim.lr 0.012" \
  "full lr*2=--optim.lr 0.016" \
  full \
  "importance@0.5 lr*1.5 lr^0.5=--pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.5 --optim.lr 0.012" \
  "importance@0.65 lr*1.5 lr^0.5=--pruning.policy importance --pruning.budget 0.65 --optim.compensation 0.5 --optim.lr 0.012" \
  "importance@0.65 lr^0.5=--pruning.policy importance --pruning.budget 0.65 --optim.compensation 0.5" \
  "importance@0.8 lr*1.5 lr^0.5=--pruning.policy importance --pruning.budget 0.8 --optim.compensation 0.5 --optim.lr 0.012" \
  "muon-importance@0.45 lr 1.2e-2=--optim.name muon --optim.lr 1.2e-2 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.45" \
  "muon-importance@0.55 lr 1.2e-2=--optim.name muon --optim.lr 1.2e-2 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.55" \
  "muon-importance@0.75 lr 1.2e-2=--optim.name muon --optim.lr 1.2e-2 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.75" \
  "muon@0.55 lr 1.2e-2=--epochs 11 --optim.name muon --optim.lr 1.2e-2" \
  "muon@0.75 lr 1.2e-2=--epochs 15 --optim.name muon --optim.lr 1.2e-2" \
  "muon@1 lr 1.2e-2=--epochs 20 --optim.name muon --optim.lr 1.2e-2" \
  "shortened@0.45 lr*1.49=--epochs 9 --optim.lr 0.01192569587999888" \
  "shortened@0.45 lr*2.22=--epochs 9 --optim.lr 0.017777777777777778" \
  "shortened@0.6 lr*1.29=--epochs 12 --optim.lr 0.010327955589886445" \
  "shortened@0.6 lr*1.67=--epochs 12 --optim.lr 0.013333333333333334" \
  "shortened@0.75 lr*1.15=--epochs 15 --optim.lr 0.009237604307034013" \
  "shortened@0.75 lr*1.33=--epochs 15 --optim.lr 0.010666666666666666" \
  "shortened@0.75 lr*2.00=--epochs 15 --optim.lr 0.016"

python benchmarks/compare.py --config benchmarks/recipes/dit_cosine.yaml --output-dir runs/compare/dit_cosine --seeds 0 1 --arms \
  "b16@0.6 lr 8e-3=--epochs 12 --batch-size 16 --optim.lr 8e-3" \
  "b16@0.75 lr 8e-3=--epochs 15 --batch-size 16 --optim.lr 8e-3" \
  "b16@1 lr 8e-3=--epochs 20 --batch-size 16 --optim.lr 8e-3" \
  "importance-b16@0.65 lr^0.5=--batch-size 16 --optim.lr 8e-3 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.65" \
  "muon-importance-b16@0.45 lr 8e-3=--batch-size 16 --optim.name muon --optim.lr 8e-3 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.45"
