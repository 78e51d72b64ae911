# Makes the records of language: bash benchmarks/results/language/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.

python benchmarks/compare_examples.py --program examples/language.py --config benchmarks/recipes/language.yaml --output-dir runs/compare/language --seeds 0 1 2 --arms \
  "full lr*2=--training.policy full --training.lr 0.002" \
  "full lr*4=--training.policy full --training.lr 0.004" \
  "full=--training.policy full" \
  "importance@0.7 lr*2.00=--training.policy importance --training.budget 0.7 --training.lr 0.002" \
  "importance@0.7=--training.policy importance --training.budget 0.7" \
  "infobatch lr*2.00=--training.policy infobatch --training.lr 0.002" \
  "infobatch=--training.policy infobatch" \
  "quantile lr*2.00=--training.policy quantile --training.lr 0.002" \
  "quantile=--training.policy quantile" \
  "random@0.7 lr*2.00=--training.policy random --training.budget 0.7 --training.lr 0.002" \
  "random@0.7=--training.policy random --training.budget 0.7" \
  "shortened@0.5 lr*1.00=--training.policy full --training.epochs 5 --training.lr 0.001" \
  "shortened@0.5 lr*1.41=--training.policy full --training.epochs 5 --training.lr 0.0014142135623730952" \
  "shortened@0.5 lr*2.00=--training.policy full --training.epochs 5 --training.lr 0.002" \
  "shortened@0.5 lr*4.00=--training.policy full --training.epochs 5 --training.lr 0.004" \
  "shortened@0.7 lr*1.00=--training.policy full --training.epochs 7 --training.lr 0.001" \
  "shortened@0.7 lr*1.20=--training.policy full --training.epochs 7 --training.lr 0.0011952286093343935" \
  "shortened@0.7 lr*1.43=--training.policy full --training.epochs 7 --training.lr 0.0014285714285714286" \
  "shortened@0.7 lr*2.86=--training.policy full --training.epochs 7 --training.lr 0.00286"
