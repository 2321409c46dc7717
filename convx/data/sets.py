"""The facts of each data set: size, classes, published pixel statistics, licence, official files and their
checksums.

Plain data and the standard library only, so that a configuration can be checked without loading anything.
"""

import difflib
from dataclasses import dataclass

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_TERMS = "ImageNet terms of access: non-commercial research and education"


@dataclass(frozen=True)
class OfficialFile:
    """One file as its authors publish it: name, published MD5, and the addresses that serve it (none inside
    an archive).
    """

    name: str
    md5: str
    urls: tuple[str, ...] = ()


@dataclass(frozen=True)
class SetFacts:
    """What is known of a data set before any file of it is read.

    ``files`` are the official files that a reader opens; ``archive`` is the official archive that unpacks to
    them (None where the files are published one by one) and ``folder`` the folder that it unpacks into.
    """

    name: str
    image_size: int | None
    channels: int
    classes: int | None
    train: int | None
    test: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    statistics_from: str
    licence: str
    origin: str
    class_names: tuple[str, ...] = ()
    archive: OfficialFile | None = None
    files: tuple[OfficialFile, ...] = ()
    folder: str = ""


def _fashion(name: str, md5: str) -> OfficialFile:
    places = (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    )
    return OfficialFile(name, md5, tuple(place + name for place in places))


def _svhn(name: str, md5: str) -> OfficialFile:
    return OfficialFile(name, md5, (f"http://ufldl.stanford.edu/housenumbers/{name}",))


def _cifar(name: str, md5: str) -> OfficialFile:
    return OfficialFile(name, md5, (f"https://www.cs.toronto.edu/~kriz/{name}",))


_ALL = (
    SetFacts(
        name="digits",
        image_size=32,
        channels=1,
        classes=10,
        train=1437,
        test=360,
        mean=None,
        std=None,
        statistics_from="computed on the training images",
        licence="CC BY 4.0 (UCI optical recognition of handwritten digits)",
        origin="ships with scikit-learn, 8x8, 17 grey levels",
        class_names=tuple("0123456789"),
    ),
    SetFacts(
        name="fashion_mnist",
        image_size=28,
        channels=1,
        classes=10,
        train=60_000,
        test=10_000,
        mean=(0.2860,),
        std=(0.3530,),
        statistics_from="published for the 28x28 training images",
        licence="MIT",
        origin="Zalando Research, Xiao et al. 2017",
        class_names=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        files=(
            _fashion("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
            _fashion("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
            _fashion("t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
            _fashion("t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
        ),
    ),
    SetFacts(
        name="cifar10",
        image_size=32,
        channels=3,
        classes=10,
        train=50_000,
        test=10_000,
        mean=(0.49139968, 0.48215841, 0.44653091),
        std=(0.24703223, 0.24348513, 0.26158784),
        statistics_from="published for the training images",
        licence="no licence stated; cite Krizhevsky 2009",
        origin="University of Toronto, Krizhevsky 2009",
        archive=_cifar("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
        folder="cifar-10-batches-py",
        files=(
            OfficialFile("data_batch_1", "c99cafc152244af753f735de768cd75f"),
            OfficialFile("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
            OfficialFile("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"),
            OfficialFile("data_batch_4", "634d18415352ddfa80567beed471001a"),
            OfficialFile("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb"),
            OfficialFile("test_batch", "40351d587109b95175f43aff81a1287e"),
            OfficialFile("batches.meta", "5ff9c542aee3614f3951f8cda6e48888"),
        ),
    ),
    SetFacts(
        name="cifar100",
        image_size=32,
        channels=3,
        classes=100,
        train=50_000,
        test=10_000,
        mean=(0.50707516, 0.48654887, 0.44091784),
        std=(0.26733429, 0.25643846, 0.27615047),
        statistics_from="published for the training images",
        licence="no licence stated; cite Krizhevsky 2009",
        origin="University of Toronto, Krizhevsky 2009",
        archive=_cifar("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
        folder="cifar-100-python",
        files=(
            OfficialFile("train", "16019d7e3df5f24257cddd939b257f8d"),
            OfficialFile("test", "f0ef6b0ae62326f3e7ffdfab6717acfc"),
            OfficialFile("meta", "7973b15100ade9c7d40fb424638fde48"),
        ),
    ),
    SetFacts(
        name="svhn",
        image_size=32,
        channels=3,
        classes=10,
        train=73_257,
        test=26_032,
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        statistics_from="published for the training images (without the extra ones)",
        licence="non-commercial use only, as its authors state",
        origin="Stanford, Netzer et al. 2011, cropped digits",
        class_names=tuple("0123456789"),
        files=(
            _svhn("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
            _svhn("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
        ),
    ),
    SetFacts(
        name="tiny_imagenet",
        image_size=64,
        channels=3,
        classes=200,
        train=100_000,
        test=10_000,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        statistics_from="ImageNet's, published",
        licence=IMAGENET_TERMS,
        origin="Stanford CS231n; the labelled validation images are the test split",
        archive=OfficialFile(
            "tiny-imagenet-200.zip",
            "90528d7ca1a48142e341f4ef8d21d0de",
            ("http://cs231n.stanford.edu/tiny-imagenet-200.zip",),
        ),
        folder="tiny-imagenet-200",
    ),
    SetFacts(
        name="canvas",
        image_size=96,
        channels=3,
        classes=10,
        train=50_000,
        test=10_000,
        mean=(0.49139968, 0.48215841, 0.44653091),
        std=(0.24703223, 0.24348513, 0.26158784),
        statistics_from="CIFAR-10's, published",
        licence="that of CIFAR-10",
        origin="CIFAR-10 objects on larger canvases (data.canvas), their places known",
    ),
    SetFacts(
        name="folder",
        image_size=None,
        channels=3,
        classes=None,
        train=None,
        test=None,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        statistics_from="ImageNet's, published",
        licence="that of the images",
        origin="any folder of class folders, ImageNet included (data.path)",
    ),
)

SETS: dict[str, SetFacts] = {facts.name: facts for facts in _ALL}


def nearest(word: str, valid) -> str:
    """Return a half sentence that names the valid word nearest to ``word``, or all if none is near."""
    close = difflib.get_close_matches(str(word), list(valid), n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"valid: {', '.join(valid)}"


def facts_of(name: str) -> SetFacts:
    """Return the facts of a set by name; ValueError with the nearest valid word otherwise."""
    if name not in SETS:
        raise ValueError(f"data.name: {name!r} is not a data set; {nearest(name, SETS)}")
    return SETS[name]


def describe_sets() -> list[dict]:
    """Return one row a data set: name, train, test (images), classes, size (pixels), channels, licence,
    origin.
    """
    return [
        {
            "name": s.name,
            "train": s.train,
            "test": s.test,
            "classes": s.classes,
            "size": s.image_size,
            "channels": s.channels,
            "licence": s.licence,
            "origin": s.origin,
        }
        for s in _ALL
    ]
