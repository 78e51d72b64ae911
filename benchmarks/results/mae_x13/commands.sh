# Makes the records of mae_x13: bash benchmarks/results/mae_x13/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.

python benchmarks/compare.py --config benchmarks/recipes/mae_x13.yaml --output-dir runs/compare/mae_x13 --seeds 0 1 2 --arms \
  full \
  "muon-half@0.33 lr 4e-3=--epochs 6 --model.decoder cross --adapter.predict 0.5 --optim.name muon --optim.lr 4e-3" \
  "muon-half@0.33 lr 8e-3=--epochs 6 --model.decoder cross --adapter.predict 0.5 --optim.name muon --optim.lr 8e-3" \
  "muon-half@0.5 lr 4e-3=--epochs 9 --model.decoder cross --adapter.predict 0.5 --optim.name muon --optim.lr 4e-3" \
  "muon-half@0.5 lr 8e-3=--epochs 9 --model.decoder cross --adapter.predict 0.5 --optim.name muon --optim.lr 8e-3" \
  "muon-half@0.67 lr 4e-3=--epochs 12 --model.decoder cross --adapter.predict 0.5 --optim.name muon --optim.lr 4e-3" \
  "muon-half@0.67 lr 8e-3=--epochs 12 --model.decoder cross --adapter.predict 0.5 --optim.name muon --optim.lr 8e-3" \
  "shortened@0.5 lr*1.00=--epochs 9 --optim.lr 1.5e-3" \
  "shortened@0.67 lr*1.00=--epochs 12 --optim.lr 1.5e-3"

python benchmarks/compare.py --config benchmarks/recipes/mae_x13.yaml --output-dir runs/compare/mae_x13 --seeds 0 --arms \
  "b32@0.67 lr 1.1e-3=--epochs 12 --batch-size 32 --optim.lr 1.1e-3" \
  "full lr*0.5=--optim.lr 7.5e-4" \
  "full lr*2=--optim.lr 3e-3" \
  "muon-half-b32@0.5 lr 4e-3=--epochs 9 --batch-size 32 --model.decoder cross --adapter.predict 0.5 --optim.name muon --optim.lr 4e-3" \
  "muon-half@0.67 lr 2e-3=--epochs 12 --model.decoder cross --adapter.predict 0.5 --optim.name muon --optim.lr 2e-3" \
  "muon-half@1 lr 8e-3=--epochs 18 --model.decoder cross --adapter.predict 0.5 --optim.name muon --optim.lr 8e-3" \
  "shortened@0.5 lr*2.00=--epochs 9 --optim.lr 3e-3" \
  "shortened@0.67 lr*2.00=--epochs 12 --optim.lr 3e-3"
