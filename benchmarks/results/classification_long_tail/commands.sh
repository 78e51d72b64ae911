# Makes the records of classification_long_tail: bash benchmarks/results/classification_long_tail/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.

python benchmarks/compare_examples.py --program examples/classification.py --config benchmarks/recipes/classification_long_tail.yaml --output-dir runs/compare/classification_long_tail --data path/to/cifar10 --seeds 0 1 2 --arms \
  "full lr*2=--training.policy full --training.lr 0.4" \
  "full=--training.policy full" \
  "infobatch lr*1.40=--training.policy infobatch --training.lr 0.27999999999999997" \
  "infobatch=--training.policy infobatch" \
  "random@0.7 lr*1.40=--training.policy random --training.budget 0.7 --training.lr 0.27999999999999997" \
  "random@0.7=--training.policy random --training.budget 0.7" \
  "shortened@0.5 lr*1.00=--training.policy full --training.epochs 10 --training.lr 0.2" \
  "shortened@0.5 lr*2.00=--training.policy full --training.epochs 10 --training.lr 0.4" \
  "shortened@0.7 lr*1.00=--training.policy full --training.epochs 14 --training.lr 0.2" \
  "shortened@0.7 lr*1.43=--training.policy full --training.epochs 14 --training.lr 0.28571428571428575" \
  "topk@0.6 lr*1.40=--training.policy full --blocking.share 0.4 --blocking.method topk --training.lr 0.28" \
  "topk@0.6=--training.policy full --blocking.share 0.4 --blocking.method topk" \
  "unbiased@0.6 lr*1.40=--training.policy full --blocking.share 0.4 --training.lr 0.28" \
  "unbiased@0.6=--training.policy full --blocking.share 0.4"
