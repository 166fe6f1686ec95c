"""An address is in a place if it is asked of a host that the place names, and of no other."""

import pytest

from qvl_batch.errors import ConfigError, ImageError
from qvl_batch.input.addresses import Address, Place, check_global, host_of


@pytest.mark.parametrize(
    ("place", "location"),
    [
        ("https://*", "https://example.org/a.png"),
        ("https://*", "https://example.org"),
        ("https://*", "https://example.org:443/a.png?size=large#top"),
        ("https://*", "HTTPS://EXAMPLE.ORG/a.png"),
        ("https://*", "https://example.org./a.png"),
        ("https://*", "https://bücher.example/ä.png"),
        ("https://*", "https://8.8.8.8/a.png"),
        ("https://*", "https://[2001:4860:4860::8888]/a.png"),
        ("https://*", "https://my_host.example/a.png"),
        ("https://*", "https://example.org/a/../b.png"),
        ("https://*", " https://example.org/a.png\n"),
        ("https://*/images", "https://example.org/images/a.png"),
        ("https://*:8443", "https://example.org:8443/a.png"),
        ("http://*", "http://example.org:80/a.png"),
        ("http://*:80", "http://example.org/a.png"),
        ("https://*.example.org", "https://example.org/a.png"),
        ("https://*.example.org", "https://a.b.example.org/a.png"),
        ("https://*.EXAMPLE.org.", "https://a.example.ORG./a.png"),
        ("https://*.bücher.example", "https://a.xn--bcher-kva.example/a.png"),
        ("https://xn--bcher-kva.example", "https://BÜCHER.example/a.png"),
        ("https://example.org", "https://example.org:443/a.png"),
        ("https://example.org:443/images/", "https://example.org/images/a.png"),
        ("http://[::1]:80", "http://[0:0::0:1]/a.png"),
        ("https://example.org/a b", "https://example.org/a%20b/c.png"),
        ("s3://bucket", "s3://bucket/a/../b.png"),
    ],
)
def test_places_hold_addresses_however_they_are_spelled(place, location):
    assert Place.of(place).holds(Address.of(location))


@pytest.mark.parametrize(
    ("place", "location"),
    [
        ("https://*", "http://example.org/a.png"),
        ("https://*", "https://example.org:8443/a.png"),
        ("https://*:8443", "https://example.org/a.png"),
        ("https://*/images", "https://example.org/images-not/a.png"),
        ("https://*/images", "https://example.org/images/../a.png"),
        ("https://*/images", "https://example.org/images/%2e%2e/a.png"),
        ("https://*/images", "https://example.org/images\\..\\a.png"),
        ("https://*/images", "https://example.org/images%5c..%5ca.png"),
        ("https://*.example.org", "https://notexample.org/a.png"),
        ("https://*.example.org", "https://example.org.evil/a.png"),
        ("https://*.example.org", "https://evil/.example.org/a.png"),
        ("https://*.example.org", "https://evil?.example.org/a.png"),
        ("https://*.example.org", "https://evil#.example.org/a.png"),
        ("https://*.example.org", "https://evil\\.example.org/a.png"),
        ("https://*.0.0.1", "https://127.0.0.1/a.png"),
        ("https://example.org", "https://www.example.org/a.png"),
        ("http://[::1]", "http://[::2]/a.png"),
        ("s3://bucket", "s3://bucket2/a.png"),
        ("s3://bucket", "gs://bucket/a.png"),
        ("s3://bucket/a", "s3://bucket/a/../b.png"),
    ],
)
def test_places_hold_no_others(place, location):
    try:
        address = Address.of(location)
    except ImageError:
        return  # a host with such characters is none
    assert not Place.of(place).holds(address)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("https://user@example.org/a", "the address has a user name before its host 'example.org'"),
        ("https://user:secret@example.org/a", "the address has a user name before its host 'example.org'"),
        ("https://example.org@evil/a", "the address has a user name before its host 'evil'"),
        ("https://example.org\\@evil/a", "the address has a user name before its host 'evil'"),
        ("https:///a", "names no host"),
        ("https://", "names no host"),
        ("https://*/a", r"'\*' is no host"),
        ("https://evil%2f.example.org/a", "'evil%2f.example.org' is no host"),
        ("https://evil%00.example.org/a", "'evil%00.example.org' is no host"),
        ("https://evil\\.example.org/a", "is no host"),
        ("https://a b/c", "'a b' is no host"),
        ("https://a..b/c", "is not a valid address"),
        ("https://" + "a" * 64 + "/c", "is not a valid address"),
        ("https://" + "a." * 130 + "org/c", "the name of a host has up to 253 characters, not 263"),
        ("https://" + "ü" * 2_000_000 + "/c", "the name of a host has up to 253 characters, not 2,000,000"),
        ("https://[::1/c", "is not a valid address"),
        ("https://[fe80::1%25eth0]/c", "is not a valid address"),
        ("https://[v1.a]/c", "is no host|is not a valid address"),
        ("https://example.org:port/c", "is not a valid address"),
        ("https://example.org:99999/c", "is not a valid address"),
    ],
)
def test_what_is_no_address_is_refused(location, message):
    with pytest.raises(ImageError, match=message) as error:
        Address.of(location)
    assert "secret" not in str(error.value)
    assert host_of(location) is None


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("HTTPS://Example.org.:443/a b?c=ä#d", "https://example.org/a%20b?c=%C3%A4"),
        ("http://bücher.example:8080", "http://xn--bcher-kva.example:8080/"),
        ("http://[0:0::1]:80/a?b=c/../d", "http://[::1]/a?b=c/../d"),
        ("http://a/b%2Fc%zz", "http://a/b%2Fc%zz"),
        ("http://a/b\tc\nd", "http://a/bcd"),
        ("http://a?b", "http://a/?b"),
    ],
)
def test_what_is_asked_for_is_what_was_checked(location, url):
    assert Address.of(location).url == url
    assert Address.of(url).url == url


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("https://", r"it names no host: write https://\* for any public host"),
        ("http:///images", r"it names no host: write http://\* for any public host"),
        ("s3://", "it names no bucket"),
        ("s3://*", "a bucket has a name without"),
        ("gs://*.a", "a bucket has a name without"),
        ("https://*example.org", r"\* stands for any host, or for all below a domain"),
        ("https://a.*.org", r"\* stands for any host, or for all below a domain"),
        ("https://*.", "it is not a valid address"),
        ("https://**", r"\* stands for any host"),
        ("https://host/*", r"leave out the \* in its path"),
        ("https://*/*.png", r"leave out the \* in its path"),
        ("https://host/a?b", "leave out what follows"),
        ("https://host/a#b", "leave out what follows"),
        ("https://host/a/../b", r"its path has a segment \. or \.\."),
        ("https://me:secret@host/a", "it has a user name before its host: write what a server"),
        ("https://host:*", "it is not a valid address"),
        ("ftp://*", "give a folder, or an address of gs, http, https, s3"),
    ],
)
def test_places_that_hold_nothing_or_not_what_they_seem_to_are_refused(place, message):
    with pytest.raises(ConfigError, match=message) as error:
        Place.of(place)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("one", "other", "do"),
    [
        ("https://*", "https://a/b", True),
        ("https://*/b/c", "https://a/b", True),
        ("https://*/c", "https://a/b", False),
        ("https://*.a.org", "https://*.b.a.org", True),
        ("https://*.a.org", "https://*", True),
        ("https://*.a.org", "https://a.org", True),
        ("https://*.a.org", "https://b.org", False),
        ("https://*", "http://*", False),
        ("https://*:444", "https://a", False),
    ],
)
def test_places_meet_if_an_address_can_be_in_both(one, other, do):
    assert Place.of(one).meets(Place.of(other)) == Place.of(other).meets(Place.of(one)) == do


PRIVATE = """127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.1.2.3 224.0.0.1
::1 :: fe80::1 fe80::1%eth0 fc00::1 ff02::1 ::ffff:10.0.0.1 ::10.0.0.1 64:ff9b::a00:1 64:ff9b::a9fe:a9fe
64:ff9b:1::808:808 2002:a00:1::1 2001:0:0:0:0:0:f5ff:fffe"""


@pytest.mark.parametrize("ip", PRIVATE.split())
def test_private_addresses_are_refused_also_within_others(ip):
    with pytest.raises(ImageError, match=f"host resolves to the private address {ip}; to permit it, name"):
        check_global("host", ip)
    with pytest.raises(ImageError, match=f"^{ip} is a private address; to permit it, name"):
        check_global(ip, ip)


@pytest.mark.parametrize("ip", ["8.8.8.8", "2001:4860:4860::8888", "64:ff9b::808:808", "2002:808:808::1"])
def test_public_addresses_are_not(ip):
    check_global("host", ip)


@pytest.mark.parametrize(
    ("location", "host"),
    [
        ("https://A.example:443/b", "a.example"),
        ("http://a.example:8080/b", "a.example:8080"),
        ("http://[::1]:8080/b", "[::1]:8080"),
        ("s3://bucket/key", "s3://bucket"),
        ("images/a.png", None),
        ("file:///a.png", None),
        ("ftp://host/a", None),
        ("s3://" + "a" * 300 + "/key", None),
    ],
)
def test_the_host_of_an_image_is_known_where_it_has_one(location, host):
    assert host_of(location) == host
