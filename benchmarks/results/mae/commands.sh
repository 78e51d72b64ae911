# Makes the records of mae: bash benchmarks/results/mae/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.

python benchmarks/compare.py --config benchmarks/recipes/mae.yaml --output-dir runs/compare/mae --seeds 0 1 2 3 4 5 6 7 8 9 --arms \
  "full lr*1.5=--optim.lr 0.003" \
  "random@0.65 lr^0.5=--pruning.policy random --pruning.budget 0.65 --optim.compensation 0.5" \
  "samples@0.65 lr^0.5=--pruning.policy importance --pruning.over samples --pruning.budget 0.65 --optim.compensation 0.5" \
  "shortened@0.65 lr*1.24=--epochs 13 --optim.lr 0.0024806946917841693" \
  "shortened@0.75 lr*1.33=--epochs 15 --optim.lr 0.0026666666666666666" \
  "shortened@0.85 lr*1.50=--epochs 17 --optim.lr 0.003"

python benchmarks/compare.py --config benchmarks/recipes/mae.yaml --output-dir runs/compare/mae --seeds 0 1 2 3 4 --arms \
  "cross@0.8=--model.decoder cross --epochs 16" \
  "cross@1=--model.decoder cross" \
  "full lr*0.25=--optim.lr 5e-4" \
  "full lr*0.5=--optim.lr 1e-3" \
  "full lr*2=--optim.lr 0.004" \
  full \
  "half-samples@0.65 lr*1.5 lr^0.5=--model.decoder cross --adapter.predict 0.5 --optim.lr 0.003 --pruning.policy importance --pruning.over samples --pruning.budget 0.65 --optim.compensation 0.5" \
  "half-samples@0.8 lr*1.5 lr^0.5=--model.decoder cross --adapter.predict 0.5 --optim.lr 0.003 --pruning.policy importance --pruning.over samples --pruning.budget 0.8 --optim.compensation 0.5" \
  "half-samples@0.8 lr*1.5=--model.decoder cross --adapter.predict 0.5 --optim.lr 0.003 --pruning.policy importance --pruning.over samples --pruning.budget 0.8" \
  "half@0.65 lr*1.86=--model.decoder cross --adapter.predict 0.5 --optim.lr 0.003721 --epochs 13" \
  "half@0.8 lr*1.5=--model.decoder cross --adapter.predict 0.5 --optim.lr 0.003 --epochs 16" \
  "half@0.8 lr*1.68=--model.decoder cross --adapter.predict 0.5 --optim.lr 0.003354 --epochs 16" \
  "half@0.8=--model.decoder cross --adapter.predict 0.5 --epochs 16" \
  "half@1 lr*1.5=--model.decoder cross --adapter.predict 0.5 --optim.lr 0.003" \
  "half@1=--model.decoder cross --adapter.predict 0.5" \
  "infobatch lr*1.5=--pruning.policy infobatch --optim.lr 0.003" \
  "infobatch lr^0.5=--pruning.policy infobatch --optim.compensation 0.5" \
  "infobatch=--pruning.policy infobatch" \
  "muon-half@0.3 lr 1.6e-2=--epochs 6 --optim.name muon --optim.lr 1.6e-2 --model.decoder cross --adapter.predict 0.5" \
  "muon-half@0.3 lr 4e-3=--epochs 6 --optim.name muon --optim.lr 4e-3 --model.decoder cross --adapter.predict 0.5" \
  "muon-half@0.3 lr 8e-3=--epochs 6 --optim.name muon --optim.lr 8e-3 --model.decoder cross --adapter.predict 0.5" \
  "muon-half@0.4 lr 1.6e-2=--epochs 8 --optim.name muon --optim.lr 1.6e-2 --model.decoder cross --adapter.predict 0.5" \
  "muon-half@0.4 lr 4e-3=--epochs 8 --optim.name muon --optim.lr 4e-3 --model.decoder cross --adapter.predict 0.5" \
  "muon-half@0.4 lr 8e-3=--epochs 8 --optim.name muon --optim.lr 8e-3 --model.decoder cross --adapter.predict 0.5" \
  "muon-half@0.5 lr 1.6e-2=--epochs 10 --optim.name muon --optim.lr 1.6e-2 --model.decoder cross --adapter.predict 0.5" \
  "muon-half@0.5 lr 4e-3=--epochs 10 --optim.name muon --optim.lr 4e-3 --model.decoder cross --adapter.predict 0.5" \
  "muon-half@0.5 lr 8e-3=--epochs 10 --optim.name muon --optim.lr 8e-3 --model.decoder cross --adapter.predict 0.5" \
  "muon-half@0.65 lr 1.6e-2=--epochs 13 --optim.name muon --optim.lr 1.6e-2 --model.decoder cross --adapter.predict 0.5" \
  "muon-half@0.65 lr 4e-3=--epochs 13 --optim.name muon --optim.lr 4e-3 --model.decoder cross --adapter.predict 0.5" \
  "muon-half@0.65 lr 8e-3=--epochs 13 --optim.name muon --optim.lr 8e-3 --model.decoder cross --adapter.predict 0.5" \
  "muon-half@1 lr 1.6e-2=--epochs 20 --optim.name muon --optim.lr 1.6e-2 --model.decoder cross --adapter.predict 0.5" \
  "muon-half@1 lr 4e-3=--epochs 20 --optim.name muon --optim.lr 4e-3 --model.decoder cross --adapter.predict 0.5" \
  "muon-half@1 lr 8e-3=--epochs 20 --optim.name muon --optim.lr 8e-3 --model.decoder cross --adapter.predict 0.5" \
  "muon@0.35 lr 1.2e-2=--epochs 7 --optim.name muon --optim.lr 1.2e-2" \
  "muon@0.35 lr 6e-3=--epochs 7 --optim.name muon --optim.lr 6e-3" \
  "muon@0.55 lr 1.2e-2=--epochs 11 --optim.name muon --optim.lr 1.2e-2" \
  "muon@0.55 lr 6e-3=--epochs 11 --optim.name muon --optim.lr 6e-3" \
  "muon@0.75 lr 1.2e-2=--epochs 15 --optim.name muon --optim.lr 1.2e-2" \
  "muon@0.75 lr 6e-3=--epochs 15 --optim.name muon --optim.lr 6e-3" \
  "muon@1 lr 1.2e-2=--epochs 20 --optim.name muon --optim.lr 1.2e-2" \
  "muon@1 lr 6e-3=--epochs 20 --optim.name muon --optim.lr 6e-3" \
  "random@0.65 lr*1.5=--pruning.policy random --pruning.budget 0.65 --optim.lr 0.003" \
  "random@0.65=--pruning.policy random --pruning.budget 0.65" \
  "samples@0.65 lr*1.5=--pruning.policy importance --pruning.over samples --pruning.budget 0.65 --optim.lr 0.003" \
  "samples@0.65 lr*2=--pruning.policy importance --pruning.over samples --pruning.budget 0.65 --optim.lr 0.004" \
  "samples@0.65=--pruning.policy importance --pruning.over samples --pruning.budget 0.65" \
  "shortened@0.45 lr*0.50=--epochs 9 --optim.lr 1e-3" \
  "shortened@0.45 lr*1.00=--epochs 9 --optim.lr 0.002" \
  "shortened@0.45 lr*1.49=--epochs 9 --optim.lr 0.00298142396999972" \
  "shortened@0.45 lr*2.22=--epochs 9 --optim.lr 0.0044444444444444444" \
  "shortened@0.45 lr*3.00=--epochs 9 --optim.lr 0.006" \
  "shortened@0.45 lr*4.00=--epochs 9 --optim.lr 8e-3" \
  "shortened@0.55 lr*0.50=--epochs 11 --optim.lr 1e-3" \
  "shortened@0.55 lr*1.00=--epochs 11 --optim.lr 0.002" \
  "shortened@0.55 lr*1.35=--epochs 11 --optim.lr 0.0026967994498529684" \
  "shortened@0.55 lr*1.82=--epochs 11 --optim.lr 0.0036363636363636364" \
  "shortened@0.55 lr*2.50=--epochs 11 --optim.lr 0.005" \
  "shortened@0.55 lr*3.50=--epochs 11 --optim.lr 7e-3" \
  "shortened@0.65 lr*0.25=--epochs 13 --optim.lr 5e-4" \
  "shortened@0.65 lr*0.50=--epochs 13 --optim.lr 1e-3" \
  "shortened@0.65 lr*1.00=--epochs 13 --optim.lr 0.002" \
  "shortened@0.65 lr*1.54=--epochs 13 --optim.lr 0.0030769230769230774" \
  "shortened@0.65 lr*2.00=--epochs 13 --optim.lr 0.004" \
  "shortened@0.65 lr*2.75=--epochs 13 --optim.lr 5.5e-3" \
  "shortened@0.65 lr*4.00=--epochs 13 --optim.lr 8e-3" \
  "shortened@0.75 lr*0.50=--epochs 15 --optim.lr 1e-3" \
  "shortened@0.75 lr*1.00=--epochs 15 --optim.lr 0.002" \
  "shortened@0.75 lr*1.15=--epochs 15 --optim.lr 0.002309401076758503" \
  "shortened@0.75 lr*2.00=--epochs 15 --optim.lr 0.004" \
  "shortened@0.75 lr*2.75=--epochs 15 --optim.lr 5.5e-3" \
  "shortened@0.75 lr*4.00=--epochs 15 --optim.lr 8e-3" \
  "shortened@0.85 lr*0.50=--epochs 17 --optim.lr 1e-3" \
  "shortened@0.85 lr*1.00=--epochs 17 --optim.lr 0.002" \
  "shortened@0.85 lr*1.08=--epochs 17 --optim.lr 0.0021693045781865615" \
  "shortened@0.85 lr*1.18=--epochs 17 --optim.lr 0.0023529411764705885" \
  "shortened@0.85 lr*2.00=--epochs 17 --optim.lr 0.004"

python benchmarks/compare.py --config benchmarks/recipes/mae.yaml --output-dir runs/compare/mae --seeds 5 6 7 8 9 --arms \
  "shortened@0.65 lr*1.54=--epochs 13 --optim.lr 0.003076923076923077"

python benchmarks/compare.py --config benchmarks/recipes/mae.yaml --output-dir runs/compare/mae --seeds 0 1 2 --arms \
  "b16@0.45 lr 1e-3=--epochs 9 --batch-size 16 --optim.lr 1e-3" \
  "b16@0.45 lr 2e-3=--epochs 9 --batch-size 16 --optim.lr 2e-3" \
  "b16@0.55 lr 2e-3=--epochs 11 --batch-size 16 --optim.lr 2e-3" \
  "b16@0.65 lr 1e-3=--epochs 13 --batch-size 16 --optim.lr 1e-3" \
  "b16@0.65 lr 2e-3=--epochs 13 --batch-size 16 --optim.lr 2e-3" \
  "b16@0.75 lr 2e-3=--epochs 15 --batch-size 16 --optim.lr 2e-3" \
  "b16@0.85 lr 2e-3=--epochs 17 --batch-size 16 --optim.lr 2e-3" \
  "b16@1 lr 1e-3=--epochs 20 --batch-size 16 --optim.lr 1e-3" \
  "b16@1 lr 2e-3=--epochs 20 --batch-size 16 --optim.lr 2e-3" \
  "half-b16@0.65 lr 2e-3=--epochs 13 --batch-size 16 --optim.lr 2e-3 --model.decoder cross --adapter.predict 0.5" \
  "half-b16@0.8 lr 1e-3=--epochs 16 --batch-size 16 --optim.lr 1e-3 --model.decoder cross --adapter.predict 0.5" \
  "half-b16@0.8 lr 2e-3=--epochs 16 --batch-size 16 --optim.lr 2e-3 --model.decoder cross --adapter.predict 0.5" \
  "half-b16@1 lr 1e-3=--epochs 20 --batch-size 16 --optim.lr 1e-3 --model.decoder cross --adapter.predict 0.5" \
  "half-b16@1 lr 2e-3=--epochs 20 --batch-size 16 --optim.lr 2e-3 --model.decoder cross --adapter.predict 0.5" \
  "muon-half-b16@0.4 lr 8e-3=--epochs 8 --batch-size 16 --optim.name muon --optim.lr 8e-3 --model.decoder cross --adapter.predict 0.5" \
  "muon-half-b16@0.5 lr 8e-3=--epochs 10 --batch-size 16 --optim.name muon --optim.lr 8e-3 --model.decoder cross --adapter.predict 0.5"

python benchmarks/compare.py --config benchmarks/recipes/mae.yaml --output-dir runs/compare/mae --seeds 0 1 --arms \
  "b8@0.65 lr 1.4e-3=--epochs 13 --batch-size 8 --optim.lr 1.4e-3" \
  "b8@1 lr 1.4e-3=--epochs 20 --batch-size 8 --optim.lr 1.4e-3" \
  "b8@1 lr 7e-4=--epochs 20 --batch-size 8 --optim.lr 7e-4" \
  "muon-half-b16@0.3 lr 4e-3=--epochs 6 --batch-size 16 --optim.name muon --optim.lr 4e-3 --model.decoder cross --adapter.predict 0.5" \
  "muon-half-b16@0.3 lr 8e-3=--epochs 6 --batch-size 16 --optim.name muon --optim.lr 8e-3 --model.decoder cross --adapter.predict 0.5" \
  "muon-half-b16@0.4 lr 4e-3=--epochs 8 --batch-size 16 --optim.name muon --optim.lr 4e-3 --model.decoder cross --adapter.predict 0.5" \
  "muon-half-b64@0.4 lr 1.6e-2=--epochs 8 --batch-size 64 --optim.name muon --optim.lr 1.6e-2 --model.decoder cross --adapter.predict 0.5" \
  "muon-half-b64@0.4 lr 8e-3=--epochs 8 --batch-size 64 --optim.name muon --optim.lr 8e-3 --model.decoder cross --adapter.predict 0.5" \
  "muon-half-b64@0.5 lr 8e-3=--epochs 10 --batch-size 64 --optim.name muon --optim.lr 8e-3 --model.decoder cross --adapter.predict 0.5" \
  "muon-half-b64@0.65 lr 8e-3=--epochs 13 --batch-size 64 --optim.name muon --optim.lr 8e-3 --model.decoder cross --adapter.predict 0.5" \
  "muon@0.35 lr 3e-3=--epochs 7 --optim.name muon --optim.lr 3e-3" \
  "muon@0.55 lr 3e-3=--epochs 11 --optim.name muon --optim.lr 3e-3" \
  "muon@0.75 lr 3e-3=--epochs 15 --optim.name muon --optim.lr 3e-3" \
  "muon@1 lr 3e-3=--epochs 20 --optim.name muon --optim.lr 3e-3"

python benchmarks/compare.py --config benchmarks/recipes/mae.yaml --output-dir runs/compare/mae --seeds 0 --arms \
  "muon-half-b64@0.5 lr 1.6e-2=--epochs 10 --batch-size 64 --optim.name muon --optim.lr 1.6e-2 --model.decoder cross --adapter.predict 0.5" \
  "muon-half-b64@0.65 lr 1.6e-2=--epochs 13 --batch-size 64 --optim.name muon --optim.lr 1.6e-2 --model.decoder cross --adapter.predict 0.5"
