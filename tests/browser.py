"""Chromium on a screen of some size and in the light or the dark, without a network."""

from urllib.request import pathname2url


def show(driver, page, width=1200, height=900, scheme="light"):
    """Open a file; what it takes from elsewhere fails, and is in the browser's log."""
    driver.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    set_screen(driver, width, height)
    set_scheme(driver, scheme)
    driver.get("file://" + pathname2url(str(page.resolve())))


def complaints(driver):
    """What the browser has logged that is not as it should be."""
    return [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def set_screen(driver, width, height):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def set_scheme(driver, scheme):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def luminance(driver, selector, name):
    """Brightness of a colour of the first such element, 0 to 765."""
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]].match(/[\\d.]+/g).map(Number)"
    return sum(driver.execute_script(script, selector, name)[:3])
