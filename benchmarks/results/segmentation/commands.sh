# Makes the records of segmentation: bash benchmarks/results/segmentation/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.

python benchmarks/compare_examples.py --program examples/segmentation.py --config benchmarks/recipes/segmentation.yaml --output-dir runs/compare/segmentation --seeds 0 1 2 3 4 --arms \
  "full lr*4=--training.policy full --training.lr 0.008" \
  "full lr*8=--training.policy full --training.lr 0.016" \
  "importance@0.7 lr*2.80=--training.policy importance --training.budget 0.7 --training.lr 0.0056" \
  "importance@0.7 lr*5.60=--training.policy importance --training.budget 0.7 --training.lr 0.0112" \
  "infobatch lr*2.80=--training.policy infobatch --training.lr 0.0056" \
  "infobatch lr*5.60=--training.policy infobatch --training.lr 0.0112" \
  "quantile lr*2.80=--training.policy quantile --training.lr 0.0056" \
  "quantile lr*5.60=--training.policy quantile --training.lr 0.0112" \
  "random@0.7 lr*2.80=--training.policy random --training.budget 0.7 --training.lr 0.0056" \
  "shortened@0.5 lr*4.00=--training.policy full --training.epochs 5 --training.lr 0.008" \
  "shortened@0.7 lr*2.86=--training.policy full --training.epochs 7 --training.lr 0.0057" \
  "shortened@0.7 lr*5.72=--training.policy full --training.epochs 7 --training.lr 0.0114"

python benchmarks/compare_examples.py --program examples/segmentation.py --config benchmarks/recipes/segmentation.yaml --output-dir runs/compare/segmentation --seeds 0 1 2 3 --arms \
  "importance@0.7 lr*8.00=--training.policy importance --training.budget 0.7 --training.lr 0.016" \
  "random@0.7 lr*5.60=--training.policy random --training.budget 0.7 --training.lr 0.0112" \
  "shortened@0.7 lr*8.00=--training.policy full --training.epochs 7 --training.lr 0.016"

python benchmarks/compare_examples.py --program examples/segmentation.py --config benchmarks/recipes/segmentation.yaml --output-dir runs/compare/segmentation --seeds 0 1 2 --arms \
  "full lr*0.5=--training.policy full --training.lr 0.001" \
  "full lr*16=--training.policy full --training.lr 0.032" \
  "full lr*2=--training.policy full --training.lr 0.004" \
  "full=--training.policy full" \
  "importance@0.7 lr*1.40=--training.policy importance --training.budget 0.7 --training.lr 0.0028" \
  "importance@0.7=--training.policy importance --training.budget 0.7" \
  "infobatch lr*1.40=--training.policy infobatch --training.lr 0.0028" \
  "quantile lr*1.40=--training.policy quantile --training.lr 0.0028" \
  "random@0.7 lr*1.40=--training.policy random --training.budget 0.7 --training.lr 0.0028" \
  "random@0.7 lr*8.00=--training.policy random --training.budget 0.7 --training.lr 0.016" \
  "shortened@0.35 lr*2.50=--training.policy full --training.epochs 4 --training.lr 0.005" \
  "shortened@0.35 lr*5.00=--training.policy full --training.epochs 4 --training.lr 0.01" \
  "shortened@0.5 lr*2.00=--training.policy full --training.epochs 5 --training.lr 0.004" \
  "shortened@0.5 lr*8.00=--training.policy full --training.epochs 5 --training.lr 0.016" \
  "shortened@0.7 lr*1.43=--training.policy full --training.epochs 7 --training.lr 0.002857142857142857"

python benchmarks/compare_examples.py --program examples/segmentation.py --config benchmarks/recipes/segmentation.yaml --output-dir runs/compare/segmentation --seeds 0 1 --arms \
  "infobatch=--training.policy infobatch" \
  "quantile=--training.policy quantile" \
  "random@0.7=--training.policy random --training.budget 0.7" \
  "shortened@0.35 lr*1.00=--training.policy full --training.epochs 4 --training.lr 0.002" \
  "shortened@0.35 lr*1.58=--training.policy full --training.epochs 4 --training.lr 0.0031622776601683794" \
  "shortened@0.5 lr*1.00=--training.policy full --training.epochs 5 --training.lr 0.002" \
  "shortened@0.5 lr*1.41=--training.policy full --training.epochs 5 --training.lr 0.0028284271247461905" \
  "shortened@0.7 lr*1.00=--training.policy full --training.epochs 7 --training.lr 0.002" \
  "shortened@0.7 lr*1.20=--training.policy full --training.epochs 7 --training.lr 0.002390457218668787"
