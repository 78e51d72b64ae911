# Makes the records of flow: bash benchmarks/results/flow/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.

python benchmarks/compare.py --config benchmarks/recipes/flow.yaml --output-dir runs/compare/flow --seeds 0 1 2 3 4 --arms \
  "full lr*0.5=--optim.lr 2.5e-3" \
  "full lr*2=--optim.lr 1e-2" \
  "full lr*3=--optim.lr 1.5e-2" \
  "muon-posterior-importance@0.35 lr 1.6e-2=--optim.name muon --optim.lr 1.6e-2 --adapter.posterior-mean --pruning.policy importance --pruning.over levels --optim.compensation 0.5 --pruning.budget 0.35" \
  "muon-posterior-importance@0.35 lr 8e-3=--optim.name muon --optim.lr 8e-3 --adapter.posterior-mean --pruning.policy importance --pruning.over levels --optim.compensation 0.5 --pruning.budget 0.35" \
  "muon-posterior-importance@0.45 lr 1.6e-2=--optim.name muon --optim.lr 1.6e-2 --adapter.posterior-mean --pruning.policy importance --pruning.over levels --optim.compensation 0.5 --pruning.budget 0.45" \
  "muon-posterior-importance@0.45 lr 8e-3=--optim.name muon --optim.lr 8e-3 --adapter.posterior-mean --pruning.policy importance --pruning.over levels --optim.compensation 0.5 --pruning.budget 0.45" \
  "muon-posterior@0.35 lr 1.6e-2=--epochs 7 --optim.name muon --optim.lr 1.6e-2 --adapter.posterior-mean" \
  "muon-posterior@0.35 lr 8e-3=--epochs 7 --optim.name muon --optim.lr 8e-3 --adapter.posterior-mean" \
  "muon-posterior@0.45 lr 1.6e-2=--epochs 9 --optim.name muon --optim.lr 1.6e-2 --adapter.posterior-mean" \
  "muon-posterior@0.45 lr 8e-3=--epochs 9 --optim.name muon --optim.lr 8e-3 --adapter.posterior-mean" \
  "muon-posterior@0.75 lr 1.6e-2=--epochs 15 --optim.name muon --optim.lr 1.6e-2 --adapter.posterior-mean" \
  "muon-posterior@1 lr 1.6e-2=--epochs 20 --optim.name muon --optim.lr 1.6e-2 --adapter.posterior-mean" \
  "muon@0.55 lr 1.6e-2=--epochs 11 --optim.name muon --optim.lr 1.6e-2" \
  "muon@0.75 lr 1.6e-2=--epochs 15 --optim.name muon --optim.lr 1.6e-2" \
  "posterior@0.55 lr 1.35e-2=--epochs 11 --adapter.posterior-mean --optim.lr 1.35e-2" \
  "posterior@0.75 lr 1.35e-2=--epochs 15 --adapter.posterior-mean --optim.lr 1.35e-2" \
  "shortened@0.55 lr*0.50=--epochs 11 --optim.lr 2.5e-3" \
  "shortened@0.55 lr*2.70=--epochs 11 --optim.lr 0.0135" \
  "shortened@0.75 lr*2.00=--epochs 15 --optim.lr 1e-2"

python benchmarks/compare.py --config benchmarks/recipes/flow.yaml --output-dir runs/compare/flow --seeds 0 1 2 4 --arms \
  full \
  "shortened@0.55 lr*1.00=--epochs 11 --optim.lr 0.005" \
  "shortened@0.75 lr*1.00=--epochs 15 --optim.lr 0.005"

python benchmarks/compare.py --config benchmarks/recipes/flow.yaml --output-dir runs/compare/flow --seeds 1 2 3 4 --arms \
  "muon-posterior-importance@0.55 lr 1.6e-2=--optim.name muon --optim.lr 1.6e-2 --adapter.posterior-mean --pruning.policy importance --pruning.over levels --optim.compensation 0.5 --pruning.budget 0.55" \
  "muon-posterior@0.55 lr 1.6e-2=--epochs 11 --optim.name muon --optim.lr 1.6e-2 --adapter.posterior-mean" \
  "muon-posterior@0.55 lr 8e-3=--epochs 11 --optim.name muon --optim.lr 8e-3 --adapter.posterior-mean"

python benchmarks/compare.py --config benchmarks/recipes/flow.yaml --output-dir runs/compare/flow --images 0 --seeds 0 1 2 3 --arms \
  "shortened@0.55 lr*1.35=--epochs 11 --optim.lr 0.00674199862" \
  "shortened@0.75 lr*1.15=--epochs 15 --optim.lr 0.00577350269"

python benchmarks/compare.py --config benchmarks/recipes/flow.yaml --output-dir runs/compare/flow --seeds 0 1 2 --arms \
  "importance@0.65 lr^0.5=--pruning.policy importance --pruning.budget 0.65 --optim.compensation 0.5" \
  "importance@0.65=--pruning.policy importance --pruning.budget 0.65" \
  "infobatch=--pruning.policy infobatch" \
  "samples@0.65=--pruning.policy importance --pruning.over samples --pruning.budget 0.65"

python benchmarks/compare.py --config benchmarks/recipes/flow.yaml --output-dir runs/compare/flow --images 0 --seeds 0 1 2 --arms \
  "full lr*1.25=--optim.lr 0.00625"

python benchmarks/compare.py --config benchmarks/recipes/flow.yaml --output-dir runs/compare/flow --seeds 0 1 --arms \
  "b16@0.55 lr 3.5e-3=--epochs 11 --batch-size 16 --optim.lr 3.5e-3" \
  "b16@1 lr 3.5e-3=--epochs 20 --batch-size 16 --optim.lr 3.5e-3" \
  "muon-posterior-importance-b16@0.35 lr 1.1e-2=--batch-size 16 --optim.name muon --optim.lr 1.1e-2 --adapter.posterior-mean --pruning.policy importance --pruning.over levels --optim.compensation 0.5 --pruning.budget 0.35" \
  "muon-posterior-importance-b16@0.35 lr 5.6e-3=--batch-size 16 --optim.name muon --optim.lr 5.6e-3 --adapter.posterior-mean --pruning.policy importance --pruning.over levels --optim.compensation 0.5 --pruning.budget 0.35" \
  "muon-posterior-importance-b16@0.45 lr 5.6e-3=--batch-size 16 --optim.name muon --optim.lr 5.6e-3 --adapter.posterior-mean --pruning.policy importance --pruning.over levels --optim.compensation 0.5 --pruning.budget 0.45" \
  "muon-posterior-importance@0.35 lr 3.2e-2=--optim.name muon --optim.lr 3.2e-2 --adapter.posterior-mean --pruning.policy importance --pruning.over levels --optim.compensation 0.5 --pruning.budget 0.35" \
  "muon-posterior-importance@0.35 lr 4e-3=--optim.name muon --optim.lr 4e-3 --adapter.posterior-mean --pruning.policy importance --pruning.over levels --optim.compensation 0.5 --pruning.budget 0.35" \
  "muon-posterior-importance@0.45 lr 3.2e-2=--optim.name muon --optim.lr 3.2e-2 --adapter.posterior-mean --pruning.policy importance --pruning.over levels --optim.compensation 0.5 --pruning.budget 0.45" \
  "muon-posterior-importance@0.45 lr 4e-3=--optim.name muon --optim.lr 4e-3 --adapter.posterior-mean --pruning.policy importance --pruning.over levels --optim.compensation 0.5 --pruning.budget 0.45" \
  "muon-posterior@0.35 lr 3.2e-2=--epochs 7 --optim.name muon --optim.lr 3.2e-2 --adapter.posterior-mean" \
  "muon-posterior@0.35 lr 4e-3=--epochs 7 --optim.name muon --optim.lr 4e-3 --adapter.posterior-mean" \
  "muon-posterior@0.55 lr 3.2e-2=--epochs 11 --optim.name muon --optim.lr 3.2e-2 --adapter.posterior-mean"

python benchmarks/compare.py --config benchmarks/recipes/flow.yaml --output-dir runs/compare/flow --images 0 --seeds 1 2 --arms \
  "shortened@0.55 lr*1.82=--epochs 11 --optim.lr 0.00909090909" \
  "shortened@0.75 lr*1.33=--epochs 15 --optim.lr 0.00666666667"

python benchmarks/compare.py --config benchmarks/recipes/flow.yaml --output-dir runs/compare/flow --seeds 0 --arms \
  "b16@0.75 lr 3.5e-3=--epochs 15 --batch-size 16 --optim.lr 3.5e-3" \
  "b16@1 lr 7e-3=--epochs 20 --batch-size 16 --optim.lr 7e-3" \
  "muon-posterior-importance@0.55 lr 1.6e-2=--optim.name muon --adapter.posterior-mean --optim.lr 1.6e-2 --pruning.policy importance --pruning.over levels --pruning.budget 0.55 --optim.compensation 0.5" \
  "muon-posterior@0.55 lr 1.6e-2=--epochs 11 --optim.name muon --adapter.posterior-mean --optim.lr 1.6e-2" \
  "muon-posterior@0.55 lr 8e-3=--epochs 11 --optim.name muon --adapter.posterior-mean --optim.lr 8e-3" \
  "muon@0.55 lr 8e-3=--epochs 11 --optim.name muon --optim.lr 8e-3" \
  "posterior@0.55 lr 6.75e-3=--epochs 11 --adapter.posterior-mean --optim.lr 6.75e-3"

python benchmarks/compare.py --config benchmarks/recipes/flow.yaml --output-dir runs/compare/flow --images 0 --seeds 0 --arms \
  "shortened@0.55 lr*1.82=--epochs 11 --optim.lr 0.00909090909090909" \
  "shortened@0.75 lr*1.33=--epochs 15 --optim.lr 0.006666666666666666"

python benchmarks/compare.py --config benchmarks/recipes/flow.yaml --output-dir runs/compare/flow --images 0 --seeds 3 --arms \
  full \
  "importance@0.65 lr^0.5=--pruning.policy importance --pruning.budget 0.65 --optim.compensation 0.5" \
  "importance@0.65=--pruning.policy importance --pruning.budget 0.65" \
  "samples@0.65=--pruning.policy importance --pruning.over samples --pruning.budget 0.65" \
  "shortened@0.55 lr*1.00=--epochs 11 --optim.lr 0.005" \
  "shortened@0.75 lr*1.00=--epochs 15 --optim.lr 0.005"
