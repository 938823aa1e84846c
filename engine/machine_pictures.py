"""Pictures of bench.py --report, where matplotlib is installed."""
import os

from engine.run_report import save_picture


def draw_pictures(report):
    """Draw ceilings.png and growth.png into the report's folder, as far as there are rows."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    for name, draw in dict(ceilings=draw_ceilings, growth=draw_growth).items():
        numbers = [row['numbers'] for row in report.rows_of(name)]
        points = [found for found in numbers if 'x' in found]
        if points:
            figure = Figure(figsize=(9, 4), layout='constrained')
            draw(figure, points)
            save_picture(figure, os.path.join(report.folder, f'{name}.png'))


def draw_ceilings(figure, points):
    """Plot the rate of matmuls over their size, a line per dtype with its middle half."""
    ax = figure.subplots()
    for dtype in dict.fromkeys(point['dtype'] for point in points):
        those = [point for point in points if point['dtype'] == dtype]
        x = [point['x'] for point in those]
        ax.plot(x, [point['tflops'][1] for point in those], 'o-', label=dtype)
        low, high = ([point['tflops'][i] for point in those] for i in (0, 2))
        ax.fill_between(x, low, high, alpha=0.2, linewidth=0)
    ax.set(xscale='log', yscale='log', xlabel='n of an n x n matmul', ylabel='TFLOP/s')
    ax.grid(alpha=0.3, which='both')
    ax.legend()


def draw_growth(figure, points):
    """
    Plot time and memory over each setting, relative to its smallest value, and what FLOPs and the
    estimate predict.
    """
    axes = figure.subplots(1, 2)
    for ax, name, predicted, label in zip(
            axes, ('seconds', 'bytes'), ('flops', 'estimate'), ('time of a step', 'memory')):
        for i, key in enumerate(dict.fromkeys(point['key'] for point in points)):
            those = sorted((p for p in points if p['key'] == key), key=lambda p: p['x'])
            x = [point['x'] / those[0]['x'] for point in those]
            for field, style in (name, 'o-'), (predicted, '--'):
                y = [point[field] / those[0][field] for point in those]
                ax.plot(x, y, style, color=f'C{i}', label=key if style == 'o-' else None)
        ax.set(xscale='log', yscale='log', xlabel='times the smallest', ylabel=f'{label}, relative')
        ax.grid(alpha=0.3, which='both')
        ax.legend(title='dashed: predicted')
