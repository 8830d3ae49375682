"""The pictures of photos: found in their packages, explained for the right class, drawn."""

import numpy as np
import photos
import pytest
import torch
from PIL import Image

from captum_reflected.errors import UsageError
from captum_reflected.models import load_model


@pytest.fixture(scope="module")
def loaded():
    return load_model("demo")


def test_photos_are_where_the_tool_looks():
    pytest.importorskip("skimage", reason="most photos are in scikit-image's wheel")
    for photo in photos.PHOTOS.values():
        with Image.open(photos.path_of(photo)) as picture:
            assert min(picture.size) >= 224


def test_a_photo_of_a_package_that_is_not_there():
    with pytest.raises(UsageError, match="no_such_package is not installed"):
        photos.path_of(photos.Photo("no_such_package", "photo.png", ()))


def test_a_photo_is_explained_for_its_classes(loaded):
    hopper = photos.PHOTOS[photos.FIRST]
    photo = photos.Photo(hopper.package, hopper.file, ("rings", "bricks"))
    rings, bricks = photos.cases(loaded, photo)
    assert [loaded.class_name(case.target) for case in (rings, bricks)] == ["rings", "bricks"]
    probability = loaded.model(rings.image).softmax(dim=-1)[0, rings.target]
    assert rings.label == f"rings, {probability:.0%}"
    first, second = (photos.overlay(loaded, case, "balanced_relevance") for case in (rings, bricks))
    assert first.shape == rings.picture.shape == (96, 96, 3)
    assert (first != second).any()


def test_of_classes_with_one_name_the_likelier_is_explained(loaded):
    photo = photos.Photo("matplotlib", photos.PHOTOS[photos.FIRST].file, ("crane",))
    names = tuple("crane, bird" if index % 2 else "crane" for index in range(10))
    renamed = photos.LoadedModel(**{**vars(loaded), "class_names": names})
    (case,) = photos.cases(renamed, photo)
    assert case.target == int(loaded.model(case.image).argmax())


def test_a_class_that_the_model_does_not_have(loaded):
    with pytest.raises(UsageError, match="demo has no class 'military uniform'"):
        photos.cases(loaded, photos.PHOTOS[photos.FIRST])


def test_a_sheet_is_written_as_the_path_says(tmp_path):
    cell = torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()
    for name, kind in (("a/sheet.png", "PNG"), ("sheet.jpg", "JPEG")):
        photos.write(
            photos.sheet([[("one", cell), ("two", cell)], [("three", cell)]]), tmp_path / name, 50
        )
        with Image.open(tmp_path / name) as picture:
            assert picture.format == kind
            assert np.asarray(picture).std() > 0
