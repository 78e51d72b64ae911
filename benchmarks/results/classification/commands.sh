# Makes the records of classification: bash benchmarks/results/classification/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.

python benchmarks/compare_examples.py --program examples/classification.py --config benchmarks/recipes/classification.yaml --output-dir runs/compare/classification --data path/to/cifar10 --seeds 0 1 2 3 4 --arms \
  "full lr*0.5=--training.policy full --training.lr 0.1" \
  "full lr*2=--training.policy full --training.lr 0.4" \
  "full=--training.policy full" \
  "ies=--training.policy ies" \
  "importance@0.7=--training.policy importance --training.budget 0.7" \
  "infobatch lr*1.40=--training.policy infobatch --training.lr 0.27999999999999997" \
  "infobatch=--training.policy infobatch" \
  "orderdp@0.7=--training.policy orderdp --training.budget 0.7" \
  "quantile=--training.policy quantile" \
  "random@0.7=--training.policy random --training.budget 0.7" \
  "selective-backprop@0.7=--training.policy selective-backprop --training.budget 0.7" \
  "seta lr*1.40=--training.policy seta --training.lr 0.27999999999999997" \
  "shortened@0.35 lr*1.58=--training.policy full --training.epochs 4 --training.lr 0.316227766016838" \
  "shortened@0.5 lr*1.00=--training.policy full --training.epochs 5 --training.lr 0.2" \
  "shortened@0.5 lr*1.41=--training.policy full --training.epochs 5 --training.lr 0.28284271247461906" \
  "shortened@0.5 lr*2.00=--training.policy full --training.epochs 5 --training.lr 0.4" \
  "shortened@0.7 lr*1.00=--training.policy full --training.epochs 7 --training.lr 0.2" \
  "shortened@0.7 lr*1.20=--training.policy full --training.epochs 7 --training.lr 0.23904572186687872" \
  "shortened@0.7 lr*1.43=--training.policy full --training.epochs 7 --training.lr 0.28571428571428575" \
  "topk@0.6=--training.policy full --blocking.share 0.4 --blocking.method topk" \
  "unbiased@0.6=--training.policy full --blocking.share 0.4"

python benchmarks/compare_examples.py --program examples/classification.py --config benchmarks/recipes/classification.yaml --output-dir runs/compare/classification --data path/to/cifar10 --seeds 0 1 2 --arms \
  "importance@0.7 lr*0.70=--training.policy importance --training.budget 0.7 --training.lr 0.13999999999999999" \
  "importance@0.7 lr*1.40=--training.policy importance --training.budget 0.7 --training.lr 0.27999999999999997" \
  "infobatch lr*0.70=--training.policy infobatch --training.lr 0.13999999999999999" \
  "orderdp@0.7 lr*0.70=--training.policy orderdp --training.budget 0.7 --training.lr 0.13999999999999999" \
  "orderdp@0.7 lr*1.40=--training.policy orderdp --training.budget 0.7 --training.lr 0.27999999999999997" \
  "quantile lr*0.70=--training.policy quantile --training.lr 0.13999999999999999" \
  "quantile lr*1.40=--training.policy quantile --training.lr 0.27999999999999997" \
  "random@0.7 lr*0.70=--training.policy random --training.budget 0.7 --training.lr 0.13999999999999999" \
  "random@0.7 lr*1.40=--training.policy random --training.budget 0.7 --training.lr 0.27999999999999997" \
  "selective-backprop@0.7 lr*0.70=--training.policy selective-backprop --training.budget 0.7 --training.lr 0.13999999999999999" \
  "selective-backprop@0.7 lr*1.40=--training.policy selective-backprop --training.budget 0.7 --training.lr 0.27999999999999997" \
  "seta lr*0.70=--training.policy seta --training.lr 0.13999999999999999" \
  "seta=--training.policy seta" \
  "shortened@0.35 lr*1.00=--training.policy full --training.epochs 4 --training.lr 0.2" \
  "shortened@0.35 lr*2.50=--training.policy full --training.epochs 4 --training.lr 0.5" \
  "topk@0.6 lr*0.70=--training.policy full --blocking.share 0.4 --blocking.method topk --training.lr 0.14" \
  "topk@0.6 lr*1.40=--training.policy full --blocking.share 0.4 --blocking.method topk --training.lr 0.28" \
  "unbiased@0.6 lr*0.70=--training.policy full --blocking.share 0.4 --training.lr 0.14" \
  "unbiased@0.6 lr*1.40=--training.policy full --blocking.share 0.4 --training.lr 0.28"
