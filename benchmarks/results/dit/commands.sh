# Makes the records of dit: bash benchmarks/results/dit/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.

python benchmarks/compare.py --config benchmarks/recipes/dit.yaml --output-dir runs/compare/dit --seeds 0 1 2 3 4 --arms \
  "full lr*1.25=--optim.lr 0.01" \
  "full lr*1.5=--optim.lr 0.012" \
  "full lr*2=--optim.lr 0.016" \
  full \
  "importance@0.45 lr^0.5=--pruning.policy importance --pruning.budget 0.45 --optim.compensation 0.5" \
  "importance@0.55 lr^0.5=--pruning.policy importance --pruning.budget 0.55 --optim.compensation 0.5" \
  "importance@0.65 lr^0.5=--pruning.policy importance --pruning.budget 0.65 --optim.compensation 0.5" \
  "importance@0.65=--pruning.policy importance --pruning.budget 0.65" \
  "importance@0.75 lr^0.5=--pruning.policy importance --pruning.budget 0.75 --optim.compensation 0.5" \
  "importance@0.85 lr^0.5=--pruning.policy importance --pruning.budget 0.85 --optim.compensation 0.5" \
  "infobatch lr^0.5=--pruning.policy infobatch --optim.compensation 0.5" \
  "infobatch=--pruning.policy infobatch" \
  "levels@0.55=--pruning.policy importance --pruning.over levels --pruning.budget 0.55" \
  "levels@0.65 lr^0.5=--pruning.policy importance --pruning.over levels --pruning.budget 0.65 --optim.compensation 0.5" \
  "levels@0.65=--pruning.policy importance --pruning.over levels --pruning.budget 0.65" \
  "muon-importance@0.35 lr 1.2e-2=--optim.name muon --optim.lr 1.2e-2 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.35" \
  "muon-importance@0.45 lr 1.2e-2=--optim.name muon --optim.lr 1.2e-2 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.45" \
  "muon-importance@0.55 lr 1.2e-2=--optim.name muon --optim.lr 1.2e-2 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.55" \
  "muon-importance@0.75 lr 1.2e-2=--optim.name muon --optim.lr 1.2e-2 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.75" \
  "muon-importance@0.9 lr 1.2e-2=--optim.name muon --optim.lr 1.2e-2 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.9" \
  "muon@0.35 lr 1.2e-2=--epochs 7 --optim.name muon --optim.lr 1.2e-2" \
  "muon@0.35 lr 2.4e-2=--epochs 7 --optim.name muon --optim.lr 2.4e-2" \
  "muon@0.45 lr 1.2e-2=--epochs 9 --optim.name muon --optim.lr 1.2e-2" \
  "muon@0.55 lr 1.2e-2=--epochs 11 --optim.name muon --optim.lr 1.2e-2" \
  "muon@0.75 lr 1.2e-2=--epochs 15 --optim.name muon --optim.lr 1.2e-2" \
  "muon@1 lr 1.2e-2=--epochs 20 --optim.name muon --optim.lr 1.2e-2" \
  "random@0.65 lr^0.5=--pruning.policy random --pruning.budget 0.65 --optim.compensation 0.5" \
  "random@0.65=--pruning.policy random --pruning.budget 0.65" \
  "samples@0.65 lr^0.5=--pruning.policy importance --pruning.over samples --pruning.budget 0.65 --optim.compensation 0.5" \
  "samples@0.65=--pruning.policy importance --pruning.over samples --pruning.budget 0.65" \
  "shortened@0.45 lr*1.00=--epochs 9 --optim.lr 0.008" \
  "shortened@0.45 lr*1.49=--epochs 9 --optim.lr 0.01192569587999888" \
  "shortened@0.45 lr*2.22=--epochs 9 --optim.lr 0.017777777777777778" \
  "shortened@0.45 lr*3.00=--epochs 9 --optim.lr 0.024" \
  "shortened@0.55 lr*1.00=--epochs 11 --optim.lr 0.008" \
  "shortened@0.55 lr*1.35=--epochs 11 --optim.lr 0.010787197799411874" \
  "shortened@0.55 lr*1.82=--epochs 11 --optim.lr 0.014545454545454545" \
  "shortened@0.55 lr*2.50=--epochs 11 --optim.lr 0.02" \
  "shortened@0.65 lr*1.00=--epochs 13 --optim.lr 0.008" \
  "shortened@0.65 lr*1.24=--epochs 13 --optim.lr 0.009922778767136677" \
  "shortened@0.65 lr*1.54=--epochs 13 --optim.lr 0.01230769230769231" \
  "shortened@0.65 lr*2.00=--epochs 13 --optim.lr 0.016" \
  "shortened@0.75 lr*1.00=--epochs 15 --optim.lr 0.008" \
  "shortened@0.75 lr*1.15=--epochs 15 --optim.lr 0.009237604307034013" \
  "shortened@0.75 lr*1.33=--epochs 15 --optim.lr 0.010666666666666666" \
  "shortened@0.75 lr*2.00=--epochs 15 --optim.lr 0.016" \
  "shortened@0.85 lr*1.00=--epochs 17 --optim.lr 0.008" \
  "shortened@0.85 lr*1.08=--epochs 17 --optim.lr 0.008677218312746246" \
  "shortened@0.85 lr*1.18=--epochs 17 --optim.lr 0.009411764705882354" \
  "shortened@0.85 lr*1.50=--epochs 17 --optim.lr 0.012" \
  "shortened@0.85 lr*2.00=--epochs 17 --optim.lr 0.016"

python benchmarks/compare.py --config benchmarks/recipes/dit.yaml --output-dir runs/compare/dit --seeds 0 1 2 --arms \
  "b16@0.45 lr 5.6e-3=--epochs 9 --batch-size 16 --optim.lr 5.6e-3" \
  "b16@0.55 lr 5.6e-3=--epochs 11 --batch-size 16 --optim.lr 5.6e-3" \
  "b16@0.65 lr 5.6e-3=--epochs 13 --batch-size 16 --optim.lr 5.6e-3" \
  "b16@0.75 lr 5.6e-3=--epochs 15 --batch-size 16 --optim.lr 5.6e-3" \
  "b16@0.85 lr 5.6e-3=--epochs 17 --batch-size 16 --optim.lr 5.6e-3" \
  "b16@1 lr 5.6e-3=--epochs 20 --batch-size 16 --optim.lr 5.6e-3" \
  "importance-b16@0.45 lr^0.5=--batch-size 16 --optim.lr 5.6e-3 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.45" \
  "importance-b16@0.55 lr^0.5=--batch-size 16 --optim.lr 5.6e-3 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.55" \
  "importance-b16@0.65 lr^0.5=--batch-size 16 --optim.lr 5.6e-3 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.65" \
  "importance-b16@0.85 lr^0.5=--batch-size 16 --optim.lr 5.6e-3 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.85" \
  "muon-b16@0.55 lr 8e-3=--epochs 11 --batch-size 16 --optim.name muon --optim.lr 8e-3" \
  "muon-b16@0.75 lr 8e-3=--epochs 15 --batch-size 16 --optim.name muon --optim.lr 8e-3" \
  "muon-importance-b16@0.35 lr 8e-3=--batch-size 16 --optim.name muon --optim.lr 8e-3 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.35" \
  "muon-importance-b16@0.45 lr 8e-3=--batch-size 16 --optim.name muon --optim.lr 8e-3 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.45" \
  "muon-importance-b16@0.55 lr 8e-3=--batch-size 16 --optim.name muon --optim.lr 8e-3 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.55"

python benchmarks/compare.py --config benchmarks/recipes/dit.yaml --output-dir runs/compare/dit --seeds 0 1 --arms \
  "b16@0.55 lr 8e-3=--epochs 11 --batch-size 16 --optim.lr 8e-3" \
  "b16@1 lr 4e-3=--epochs 20 --batch-size 16 --optim.lr 4e-3" \
  "b16@1 lr 8e-3=--epochs 20 --batch-size 16 --optim.lr 8e-3" \
  "b8@0.55 lr 4e-3=--epochs 11 --batch-size 8 --optim.lr 4e-3" \
  "b8@0.65 lr 4e-3=--epochs 13 --batch-size 8 --optim.lr 4e-3" \
  "b8@0.75 lr 4e-3=--epochs 15 --batch-size 8 --optim.lr 4e-3" \
  "b8@0.85 lr 4e-3=--epochs 17 --batch-size 8 --optim.lr 4e-3" \
  "b8@1 lr 2.8e-3=--epochs 20 --batch-size 8 --optim.lr 2.8e-3" \
  "b8@1 lr 4e-3=--epochs 20 --batch-size 8 --optim.lr 4e-3" \
  "importance-b8@0.65 lr^0.5=--batch-size 8 --optim.lr 4e-3 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.65" \
  "muon-importance-b16@0.45 lr 1.2e-2=--batch-size 16 --optim.name muon --optim.lr 1.2e-2 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.45" \
  "muon-importance-b16@0.45 lr 5.6e-3=--batch-size 16 --optim.name muon --optim.lr 5.6e-3 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.45" \
  "muon-importance@0.45 lr 2.4e-2=--optim.name muon --optim.lr 2.4e-2 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.45" \
  "muon-importance@0.45 lr 6e-3=--optim.name muon --optim.lr 6e-3 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.45" \
  "muon-importance@0.55 lr 2.4e-2=--optim.name muon --optim.lr 2.4e-2 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.55" \
  "muon-importance@0.55 lr 6e-3=--optim.name muon --optim.lr 6e-3 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.55" \
  "muon@0.35 lr 6e-3=--epochs 7 --optim.name muon --optim.lr 6e-3" \
  "muon@0.45 lr 2.4e-2=--epochs 9 --optim.name muon --optim.lr 2.4e-2" \
  "muon@0.45 lr 6e-3=--epochs 9 --optim.name muon --optim.lr 6e-3" \
  "muon@0.55 lr 2.4e-2=--epochs 11 --optim.name muon --optim.lr 2.4e-2" \
  "muon@0.55 lr 6e-3=--epochs 11 --optim.name muon --optim.lr 6e-3" \
  "muon@0.75 lr 2.4e-2=--epochs 15 --optim.name muon --optim.lr 2.4e-2" \
  "muon@0.75 lr 6e-3=--epochs 15 --optim.name muon --optim.lr 6e-3" \
  "muon@1 lr 2.4e-2=--epochs 20 --optim.name muon --optim.lr 2.4e-2" \
  "muon@1 lr 6e-3=--epochs 20 --optim.name muon --optim.lr 6e-3"

python benchmarks/compare.py --config benchmarks/recipes/dit.yaml --output-dir runs/compare/dit --seeds 0 --arms \
  "muon-importance-b64@0.45 lr 1.2e-2=--batch-size 64 --optim.name muon --optim.lr 1.2e-2 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.45" \
  "muon-importance-b64@0.45 lr 1.7e-2=--batch-size 64 --optim.name muon --optim.lr 1.7e-2 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.45" \
  "muon-importance-b64@0.45 lr 2.4e-2=--batch-size 64 --optim.name muon --optim.lr 2.4e-2 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.45" \
  "muon-importance-b64@0.55 lr 1.2e-2=--batch-size 64 --optim.name muon --optim.lr 1.2e-2 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.55" \
  "muon-importance-b64@0.55 lr 1.7e-2=--batch-size 64 --optim.name muon --optim.lr 1.7e-2 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.55"
